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
  i32 local;        // the column it reads, from the tile's first
  bool fast, on;    // on: this lane writes (fast rows only)
  bool leads;       // this lane writes its block's statistics (fast rows only)
  u64 param, grad, m_codes, v_codes, m_absmax, v_absmax;  // of this lane's columns in the first row
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
    local = (fast ? from : col) - tile.group * TILE_COLS;
  }

  // Addresses in the i-th row.
  DEVICE u64 param_at(i32 i) const { return place_of(param, i, param_step); }
  DEVICE u64 grad_at(i32 i) const { return place_of(grad, i, grad_step); }
  DEVICE u64 m_codes_at(i32 i) const { return place_of(m_codes, i, code_step); }
  DEVICE u64 v_codes_at(i32 i) const { return place_of(v_codes, i, code_step); }
  DEVICE u64 m_absmax_at(i32 i) const { return place_of(m_absmax, i, absmax_step); }
  DEVICE u64 v_absmax_at(i32 i) const { return place_of(v_absmax, i, absmax_step); }
};

// One row of a warp on its way from global memory, lane by lane. Where parameters and gradients have 16 bits,
// rows are fetched one ahead: there is enough arithmetic to hide the loads behind. (With 32 bits it costs: the
// copies of a lane's two vectors use half of every sector.)
#define STAGES 2
#define STAGED (PARAM::vectors + GRAD::vectors == 2)
struct __align__(16) Stage {
  uint4 param[PARAM::vectors][32], grad[GRAD::vectors][32];
  u32 m_codes[32];
  float m_absmax[32];
#if SECOND == RANK1 || SECOND == BLOCKED
  u32 v_codes[32];
#endif
#if SECOND == BLOCKED
  float v_absmax[32];
#endif

  // Start fetching the i-th row, if there is one (fast rows only).
  DEVICE void fetch(const Window& w, i32 i, i32 lane_id) {
    if (i < w.count) {
#pragma unroll
      for (i32 j = 0; j < PARAM::vectors; ++j) copy16(&param[j][lane_id], w.param_at(i) + 16 * j);
#pragma unroll
      for (i32 j = 0; j < GRAD::vectors; ++j) copy16(&grad[j][lane_id], w.grad_at(i) + 16 * j);
      copy4(&m_codes[lane_id], w.m_codes_at(i));
      copy4(&m_absmax[lane_id], w.m_absmax_at(i));
#if SECOND == RANK1 || SECOND == BLOCKED
      copy4(&v_codes[lane_id], w.v_codes_at(i));
#endif
#if SECOND == BLOCKED
      copy4(&v_absmax[lane_id], w.v_absmax_at(i));
#endif
    }
    end_copies();
  }

  template <class T>
  DEVICE static void read(T t, const uint4 (*from)[32], i32 lane_id, float* x) {
    uint4 a[T::vectors];
#pragma unroll
    for (i32 j = 0; j < T::vectors; ++j) a[j] = from[j][lane_id];
    unpack8(t, a, x);
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

// (AdamW's maximize is in the sign of 1-beta1: the second moment takes squares.)
DEVICE void orient8(const Hyper& h, float* grad) {
#if RULE == SGD
  if (h.maximize) {
#pragma unroll
    for (i32 k = 0; k < 8; ++k) grad[k] = -grad[k];
  }
#endif
}

DEVICE void load_gradient(const Slab& s, const Live& live, const Hyper& h, i32 row, const Lane& lane,
                          float* x) {
  load_lane(GRAD(), live.grad, element(s, row, lane.col), lane, x);
  orient8(h, x);
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

// Two maxima over the 16 lanes of a block for little more than the price of one: the lower eight lanes
// gather the first, the upper eight the second. ``finish`` (value, is second) settles a maximum and gives its
// reciprocal; every lane then has both.
struct Scale {
  float stat, inv;
};

template <class Finish>
DEVICE void block_max2(float a, float b, i32 lane_id, Finish finish, Scale& first, Scale& second) {
  bool upper = lane_id & 8;
  float mine = upper ? b : a;
  mine = max_or_nan(mine, __shfl_xor_sync(FULL_MASK, upper ? a : b, 8));
#pragma unroll
  for (i32 step = 4; step > 0; step /= 2) mine = max_or_nan(mine, __shfl_xor_sync(FULL_MASK, mine, step));
  Scale own = finish(mine, upper), other;
  other.stat = __shfl_xor_sync(FULL_MASK, own.stat, 8);
  other.inv = __shfl_xor_sync(FULL_MASK, own.inv, 8);
  first = upper ? other : own;
  second = upper ? own : other;
}

// Four or eight consecutive floats of shared memory.
DEVICE void read4(const float* from, float* x) {
  float4 a = *(const float4*)from;
  x[0] = a.x, x[1] = a.y, x[2] = a.z, x[3] = a.w;
}

DEVICE void read8(const float* from, float* x) {
  read4(from, x);
  read4(from + 4, x + 4);
}
