// Statistics of new moments that one pass cannot know: rank-1 maxima, sums of squares, shared blocks.
#pragma once

// The new absmax of one block that ranks share, of some rows; 16 lanes take a row.
DEVICE void measure_shared_block(const Slab& s, const Live& live, const Hyper& h, const Tables& t,
                                 const Tile& tile, i32 warp, i32 lane_id) {
  i32 block = -1 - tile.group;
  for (i32 base = 2 * warp; base < tile.rows; base += 2 * WARPS) {
    i32 row = tile.row0 + base + lane_id / 16;
    bool there = base + lane_id / 16 < tile.rows;
    Span columns = there ? span(s, row) : Span{0, 0};
    Lane lane(columns, block * BLOCK + (lane_id & 15) * LANE_COLS);
    if (!there) row = tile.row0;
    float grad[8], param[8], first[8];
    load_gradient(s, live, h, row, lane, grad);
#if RULE == SGD
    load_lane(PARAM(), live.param, element(s, row, lane.col), lane, param);
#else
    param[0] = 0.0f;
#endif
    old_first(s, t, row, lane, block, first);
#pragma unroll
    for (i32 k = 0; k < 8; ++k) first[k] = new_first(h, first[k], grad[k], param[RULE == SGD ? k : 0]);
    zero_others(lane, first);
    float m = block_max(largest8(first));
    bool writes = there && (lane_id & 15) == 0;
    if (writes) ((float*)s.new_m_absmax)[block_place(s, row, block)] = m;
#if SECOND == BLOCKED
    float second[8];
    linear_values8(second_codes(s, row, lane), second);
    scale8(second, lane.some() ? ((const float*)s.v_row)[block_place(s, row, block)] : 0.0f);
#pragma unroll
    for (i32 k = 0; k < 8; ++k) second[k] = new_second(h, second[k], grad[k]);
    zero_others(lane, second);
    float v = block_max(largest8(second));
    if (writes) ((float*)s.new_v_absmax)[block_place(s, row, block)] = v;
#endif
  }
}

#if SECOND == RANK1
// Maxima of the new second moment over a warp's rows (one register a lane) and columns. They travel as
// integers: of non-negative floats the integer order is the float order, with NaN on top.
template <bool FAST>
DEVICE void rank1_maxima(const Slab& s, const Live& live, const Hyper& h, const Window& w, i32 lane_id,
                         const float* col_max, float* col_new) {
  i32 mine = w.row0 + lane_id;
  float my_row_max = lane_id < w.count ? ((const float*)s.v_row)[mine] : 0.0f;
  u32 my_row_new = 0;
  for (i32 i = 0; i < w.count; ++i) {
    i32 row = w.row0 + i;
    Lane lane(FAST ? Span{s.col0, s.col1} : span(s, row), w.col);
    float row_max = __shfl_sync(FULL_MASK, my_row_max, i);
    float grad[8], second[8];
    if (FAST) {
      load8(GRAD(), w.grad_at(i), grad);
      linear_values8(load4(w.v_codes_at(i)), second);
    } else {
      load_gradient(s, live, h, row, lane, grad);
      linear_values8(second_codes(s, row, lane), second);
    }
#pragma unroll
    for (i32 k = 0; k < 8; ++k)
      second[k] = new_second(h, mul(second[k], min_or_nan(row_max, col_max[k])), grad[k]);
    if (!FAST) zero_others(lane, second);
    float largest = second[0];
#pragma unroll
    for (i32 k = 0; k < 8; ++k) {
      col_new[k] = max_or_nan(col_new[k], second[k]);
      if (k > 0) largest = max_or_nan(largest, second[k]);
    }
    u32 row_new = __reduce_max_sync(FULL_MASK, __float_as_uint(largest));
    if (lane_id == i) my_row_new = row_new;
  }
  if (lane_id < w.count) atomicMax((i32*)s.new_row + mine, (i32)my_row_new);
}

DEVICE void measure_rank1(const Slab& s, const Live& live, const Hyper& h, const Tile& tile, i32 warp,
                          i32 lane_id) {
  __shared__ i32 columns[TILE_COLS];
  __shared__ __align__(16) float old_columns[TILE_COLS];
  Window w(s, live, tile, warp, lane_id);
  float col_max[8], col_new[8];
  i32 col = tile.group * TILE_COLS + (i32)threadIdx.x;
  bool stored = col >= s.col0 && col < s.col1;
  old_columns[threadIdx.x] = stored ? ((const float*)s.v_col)[col - s.col0] : 0.0f;
  columns[threadIdx.x] = 0;
  __syncthreads();
  read8(old_columns + w.local, col_max);
#pragma unroll
  for (i32 k = 0; k < 8; ++k) col_new[k] = 0.0f;
  if (w.fast)
    rank1_maxima<true>(s, live, h, w, lane_id, col_max, col_new);
  else
    rank1_maxima<false>(s, live, h, w, lane_id, col_max, col_new);
  if (w.on || !w.fast) {
#pragma unroll
    for (i32 k = 0; k < 8; ++k) atomicMax(&columns[lane_id * LANE_COLS + k], __float_as_int(col_new[k]));
  }
  __syncthreads();
  if (stored) atomicMax((i32*)s.new_col + (col - s.col0), columns[threadIdx.x]);
}
#endif

#if SECOND == FACTORED
// Partial sums of squares: of each row over the tile's columns, of each column over the tile's rows. No
// more than 32 terms are added in fp32; vectors.cu adds the partial sums in a fixed order.
template <bool FAST>
DEVICE void squares(const Slab& s, const Live& live, const Hyper& h, const Window& w, i32 lane_id,
                    float* row_out, float* col_sum) {
  float my_row = 0.0f;
  for (i32 i = 0; i < w.count; ++i) {
    i32 row = w.row0 + i;
    float grad[8];
    if (FAST) {
      load8(GRAD(), w.grad_at(i), grad);
    } else {
      load_gradient(s, live, h, row, Lane(span(s, row), w.col), grad);
    }
#pragma unroll
    for (i32 k = 0; k < 8; ++k) {
      grad[k] = mul(grad[k], grad[k]);
      col_sum[k] = add(col_sum[k], grad[k]);
    }
    float row_part = add(add(add(grad[0], grad[1]), add(grad[2], grad[3])),
                         add(add(grad[4], grad[5]), add(grad[6], grad[7])));
    if (FAST && !w.on) row_part = 0.0f;
#pragma unroll
    for (i32 step = 16; step > 0; step /= 2)
      row_part = add(row_part, __shfl_xor_sync(FULL_MASK, row_part, step));
    if (lane_id == i) my_row = row_part;
  }
  if (lane_id < w.count) row_out[w.row0 + lane_id] = my_row;
}

DEVICE void measure_factored(const Slab& s, const Live& live, const Hyper& h, const Tile& tile, i32 warp,
                             i32 lane_id) {
  __shared__ float columns[WARPS][TILE_COLS];
  Window w(s, live, tile, warp, lane_id);
  float col_sum[8];
#pragma unroll
  for (i32 k = 0; k < 8; ++k) col_sum[k] = 0.0f;
  float* row_out = (float*)s.part_row + (i64)(tile.group - s.col0 / TILE_COLS) * s.rows;
  if (w.fast)
    squares<true>(s, live, h, w, lane_id, row_out, col_sum);
  else
    squares<false>(s, live, h, w, lane_id, row_out, col_sum);
#pragma unroll
  for (i32 k = 0; k < 8; ++k) columns[warp][lane_id * LANE_COLS + k] = col_sum[k];
  __syncthreads();
  double sum = 0.0;
  for (i32 i = 0; i < WARPS; ++i) sum += to_double(columns[i][threadIdx.x]);
  float* col_out = (float*)s.part_col + (i64)(tile.row0 / TILE_ROWS) * (s.col1 - s.col0);
  i32 col = tile.group * TILE_COLS + (i32)threadIdx.x;
  if (col >= s.col0 && col < s.col1) col_out[col - s.col0] = to_float(sum);
}
#endif
