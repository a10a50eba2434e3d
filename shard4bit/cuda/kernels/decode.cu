// A moment's values in fp32, for inspection and export. Compiled for FIRST 1 (the first moment) or FIRST 0
// (the second, as SECOND says); a tile as in the step, one row of a warp at a time.
extern "C" __global__ void __launch_bounds__(32 * WARPS)
    decode(const Tile* tiles, const Slab* slabs, const Tables* tables, u64 out) {
  __shared__ Tables shared;
  const u32* from = (const u32*)tables;
  for (u32 i = threadIdx.x; i < sizeof(Tables) / 4; i += blockDim.x) ((u32*)&shared)[i] = from[i];
  __syncthreads();
  i32 warp = threadIdx.x / 32, lane_id = threadIdx.x & 31;
  Tile tile = tiles[blockIdx.x];
  const Slab& s = slabs[tile.slab];
  i32 col = tile.group * TILE_COLS + lane_id * LANE_COLS;
  for (i32 row = tile.row0 + warp; row < tile.row0 + tile.rows; row += WARPS) {
    Lane lane(span(s, row), col);
    if (!lane.some()) continue;
    float x[8];
#if FIRST
    old_first(s, shared, row, lane, col / BLOCK, x);
#elif SECOND == BLOCKED
    linear_values8(second_codes(s, row, lane), x);
    scale8(x, ((const float*)s.v_row)[block_place(s, row, col / BLOCK)]);
#else
    float by_row = ((const float*)s.v_row)[row];
    const float* by_column = (const float*)s.v_col + (col - s.col0);
#if SECOND == RANK1
    linear_values8(second_codes(s, row, lane), x);
#pragma unroll
    for (i32 k = 0; k < 8; ++k)
      if (lane.has(k)) x[k] = mul(x[k], min_or_nan(by_row, by_column[k]));
#else
    float mean = *(const float*)s.v_mean;
    float rho = mean == 0.0f ? 0.0f : divide(by_row, mean);
#pragma unroll
    for (i32 k = 0; k < 8; ++k) x[k] = lane.has(k) ? mul(rho, by_column[k]) : 0.0f;
#endif
#endif
    store_lane(F32(), out, element(s, row, col), lane, x);
  }
}
