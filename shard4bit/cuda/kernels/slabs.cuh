// What a launch works on: tables of slabs and tiles, and the windows of rows. Include after codes.cuh.
//
// One launch serves all slabs of a step: a thread block takes one tile, some rows of 256 columns. Each of
// its warps takes 32 rows, a lane eight columns that start at a multiple of eight, so that codes keep their
// nibbles and blocks their lanes.
#pragma once

#define LANE_COLS 8
#define TILE_COLS 256
#define BLOCK 128  // columns of a block
#define TILE_ROWS 256  // rows of a tile at most, and the distance of tiles' first rows
#define FLAT_TILE 16384  // elements of a tile of a slab that keeps fp32 moments

enum Kind { QUANTIZED = 0, FP32_MOMENTS = 1 };

// One parameter's part on this device; pointers are device addresses, 0 where there is none.
// The host's numpy dtype (tables.py) mirrors this, field by field.
struct Slab {
  u64 m_codes, m_absmax;           // first moment; FP32_MOMENTS: m_codes is the fp32 moment
  u64 v_codes;                     // second moment's codes; FP32_MOMENTS: the fp32 moment
  u64 v_row, v_col;                // row_max and col_max, absmax and none, or row_mean and col_mean
  u64 v_mean;                      // factored: the overall mean
  u64 new_m_absmax, new_v_absmax;  // statistics of blocks that ranks share, laid out as the stored ones
  u64 new_row, new_col, new_sum;   // of the new second moment: maxima, unsettled, or float64 sums
  u64 part_row, part_col;          // factored: partial sums, see measure
  u64 numbers;                     // u32: numbers of the stored rows in the whole; 0: from row0
  i64 numel, head, tail;           // elements held; of the first and last stored row not ours
  i64 all_rows;                    // rows of the whole
  i32 rows, col0, col1, cols;      // stored rows, stored columns, columns of the whole
  i32 kind;
  u32 row0;  // number of the first stored row in the whole, modulo 2^32
};

struct Live {  // changes every step
  u64 param, grad;  // grad 0: zeros
  i32 hyper, active;
};

struct Tile {
  i32 slab, row0, rows, group;  // group: columns from 256 group; of a measured shared block: -1 - block
};

struct Hyper {  // scalars of a rule, rounded once from float64 (maths/update.py)
  float a, b, c, d, e, f, g, h;
  i32 maximize, first;
  i32 tame;     // beta2, root and eps are of usual size, see update8
  float ahead;  // of a compensated step, else 0: see lead8
  u32 draw;     // number of a step that rounds stochastically, else 0: see encode_drawn8
};

// The columns [low, high) of one stored row that are ours.
struct Span {
  i32 low, high;
};

DEVICE Span span(const Slab& s, i32 row) {
  Span out = {s.col0, s.col1};
  if (row == 0) out.low += (i32)s.head;
  if (row == s.rows - 1) out.high -= (i32)s.tail;
  return out;
}

// Index of (row, col) in the rank's dense elements; meaningless outside of the row's span.
DEVICE i64 element(const Slab& s, i32 row, i32 col) {
  return (i64)row * (s.col1 - s.col0) + (col - s.col0) - s.head;
}

// Byte of the codes with column ``col`` (a multiple of eight), from the first stored byte.
DEVICE i64 code_byte(const Slab& s, i32 row, i32 col) {
  i32 first = s.col0 / 2, stop = (s.col1 + 1) / 2;
  return (i64)row * (stop - first) + (col / 2 - first);
}

DEVICE i64 block_place(const Slab& s, i32 row, i32 block) {
  i32 first = s.col0 / BLOCK, stop = (s.col1 + BLOCK - 1) / BLOCK;
  return (i64)row * (stop - first) + (block - first);
}

// A lane's eight columns of one row.
struct Lane {
  i32 col, first, stop;  // columns col + [first, stop) are ours
  DEVICE Lane(Span row, i32 col_) : col(col_) {
    first = larger(0, row.low - col_);
    stop = smaller(LANE_COLS, row.high - col_);
  }
  DEVICE bool whole() const { return first == 0 && stop == LANE_COLS; }
  DEVICE bool some() const { return first < stop; }
  DEVICE bool has(i32 k) const { return k >= first && k < stop; }
};

DEVICE bool aligned(u64 address, u32 bytes) { return (address & (bytes - 1)) == 0; }

// Eight elements; zeros where they are not ours or where there is no tensor.
template <class T>
DEVICE void load_lane(T t, u64 base, i64 at, const Lane& lane, float* x) {
  typedef typename T::raw raw;
  const raw* p = (const raw*)base + at;
  if (base != 0 && lane.whole() && aligned((u64)p, 16)) {
    load8(t, (u64)p, x);
  } else {
#pragma unroll
    for (i32 k = 0; k < 8; ++k) x[k] = base != 0 && lane.has(k) ? widen(t, p[k]) : 0.0f;
  }
}

template <class T>
DEVICE void store_lane(T t, u64 base, i64 at, const Lane& lane, const float* x) {
  typedef typename T::raw raw;
  raw* p = (raw*)base + at;
  if (lane.whole() && aligned((u64)p, 16)) {
    store8(t, (u64)p, x);
  } else {
#pragma unroll
    for (i32 k = 0; k < 8; ++k)
      if (lane.has(k)) p[k] = narrow(t, x[k]);
  }
}

// A lane's eight codes; 0 where they are not ours.
DEVICE u32 load_codes(u64 base, i64 at, const Lane& lane) {
  const u8* p = (const u8*)base + at;
  if (lane.whole() && aligned((u64)p, 4)) return load4((u64)p);
  u32 word = 0;
#pragma unroll
  for (i32 j = 0; j < 4; ++j)
    if (lane.has(2 * j) || lane.has(2 * j + 1)) word |= (u32)p[j] << (8 * j);
  return word;
}

// Store codes; a byte's nibble that is not ours becomes 0.
DEVICE void store_codes(u64 base, i64 at, const Lane& lane, u32 word) {
  u8* p = (u8*)base + at;
  if (lane.whole() && aligned((u64)p, 4)) {
    store4((u64)p, word);
    return;
  }
#pragma unroll
  for (i32 k = 0; k < 8; ++k)
    if (!lane.has(k)) word &= ~(15u << (4 * k));
#pragma unroll
  for (i32 j = 0; j < 4; ++j)
    if (lane.has(2 * j) || lane.has(2 * j + 1)) p[j] = (u8)(word >> (8 * j));
}

// Largest of a value over the 16 lanes of a block; NaN wins.
DEVICE float block_max(float x) {
#pragma unroll
  for (i32 step = 8; step > 0; step /= 2) x = max_or_nan(x, __shfl_xor_sync(FULL_MASK, x, step));
  return x;
}
