"""Pure functions on tensors: code tables, packing, statistics and update rules. No ranks, no devices."""
