// A warp's rows of a tile: where they are, and whether they can be read without looking at every element.
#pragma once

#define WARPS 8  // of a thread block
#define WARP_ROWS (TILE_ROWS / WARPS)

// One warp's share of a tile. ``fast``: every lane has eight columns or none, no row or block is cut, there
// is a gradient, and all addresses are aligned. Then a lane without columns reads those of its block's first
// lane (or of the tile's first), which changes no maximum, and writes nothing.
struct Window {
  i32 row0, count;  // stored rows
  i32 col, block;   // of this lane
  bool fast, on;    // on: this lane writes (fast rows only)
  bool leads;       // this lane writes its block's statistics (fast rows only)
  u64 param, grad, m_codes, v_codes, m_absmax, v_absmax;  // of this lane's columns in the next row
  u32 param_step, grad_step, code_step, absmax_step;      // bytes from row to row

  DEVICE Window(const Slab& s, const Live& live, const Tile& tile, i32 warp, i32 lane_id) {
    row0 = tile.row0 + warp * WARP_ROWS;
    count = larger(0, smaller(WARP_ROWS, tile.row0 + tile.rows - row0));
    col = tile.group * TILE_COLS + lane_id * LANE_COLS;
    block = col / BLOCK;
    Lane lane(Span{s.col0, s.col1}, col);
    on = lane.whole();
    i32 start = larger(s.col0, block * BLOCK), stop = smaller((block + 1) * BLOCK, s.col1);
    leads = start < stop && (lane_id & 15) == 0;
    bool cut = start < stop && (s.col0 > block * BLOCK || smaller((block + 1) * BLOCK, s.cols) > s.col1);
    cut |= (row0 == 0 && s.head) || (row0 + count == s.rows && s.tail);
    i32 from = on ? col : start < stop ? start : larger(s.col0, tile.group * TILE_COLS);
    i32 width = s.col1 - s.col0, bytes = (s.col1 + 1) / 2 - s.col0 / 2;
    param_step = width * sizeof(PARAM::raw), grad_step = width * sizeof(GRAD::raw);
    code_step = bytes, absmax_step = 4 * ((s.col1 + BLOCK - 1) / BLOCK - s.col0 / BLOCK);
    i64 at = element(s, row0, from), byte = code_byte(s, row0, from);
    param = live.param + at * (i64)sizeof(PARAM::raw), grad = live.grad + at * (i64)sizeof(GRAD::raw);
    m_codes = s.m_codes + byte, v_codes = s.v_codes + byte;
    i64 place = 4 * block_place(s, row0, from / BLOCK);
    m_absmax = s.m_absmax + place, v_absmax = s.v_row + place;
    bool even = aligned(param | param_step | grad | grad_step, 16) &&
                aligned(m_codes | v_codes | (u64)code_step, 4);
    fast = __all_sync(FULL_MASK, even && !cut && live.grad != 0 && (on || !lane.some()));
  }

  DEVICE void next() {
    param += param_step, grad += grad_step, m_codes += code_step, v_codes += code_step;
    m_absmax += absmax_step, v_absmax += absmax_step;
  }
};

// A lane's block in one row of which part may be missing.
struct Block {
  i64 place;  // of its statistics
  bool shared, writes;
  DEVICE Block(const Slab& s, Span row, i32 number, i32 row_number, i32 lane_id) {
    i32 low = number * BLOCK, high = smaller(low + BLOCK, s.cols);
    bool held = larger(low, row.low) < smaller(high, row.high);
    place = block_place(s, row_number, number);
    shared = held && (low < row.low || high > row.high);  // partly on other ranks
    writes = held && (lane_id & 15) == 0;
  }
};

// Largest magnitude of eight values; those that are not ours are zeros.
DEVICE float largest8(const float* x) {
  float out = magnitude(x[0]);
#pragma unroll
  for (i32 k = 1; k < 8; ++k) out = max_or_nan(out, magnitude(x[k]));
  return out;
}

DEVICE void zero_others(const Lane& lane, float* x) {
#pragma unroll
  for (i32 k = 0; k < 8; ++k)
    if (!lane.has(k)) x[k] = 0.0f;
}

DEVICE void scale8(float* x, float by) {
#pragma unroll
  for (i32 k = 0; k < 8; ++k) x[k] = mul(x[k], by);
}

DEVICE void negate8(float* x) {
#pragma unroll
  for (i32 k = 0; k < 8; ++k) x[k] = -x[k];
}

DEVICE void load_gradient(const Slab& s, const Live& live, const Hyper& h, i32 row, const Lane& lane,
                          float* x) {
  load_lane(GRAD(), live.grad, element(s, row, lane.col), lane, x);
  if (h.maximize) negate8(x);
}

// A lane's old first moment where part of the row may be missing.
DEVICE void old_first(const Slab& s, const Tables& t, i32 row, const Lane& lane, i32 block, float* x) {
  bool some = lane.some();
  signed_values8(t, some ? load_codes(s.m_codes, code_byte(s, row, lane.col), lane) : 0u, x);
  scale8(x, some ? ((const float*)s.m_absmax)[block_place(s, row, block)] : 0.0f);
}

DEVICE u32 second_codes(const Slab& s, i32 row, const Lane& lane) {
  return lane.some() ? load_codes(s.v_codes, code_byte(s, row, lane.col), lane) : 0u;
}

// Row or column statistics of a lane's eight columns; 0 where they are not stored.
DEVICE void load_columns(u64 base, const Slab& s, i32 col, float* x) {
  Lane lane(Span{s.col0, s.col1}, col);
  const float* p = (const float*)base + (col - s.col0);
#pragma unroll
  for (i32 k = 0; k < 8; ++k) x[k] = lane.has(k) ? p[k] : 0.0f;
}
