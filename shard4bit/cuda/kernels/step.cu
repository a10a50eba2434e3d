// The fused optimizer step. Compiled once for each combination of
//   PARAM, GRAD: F32, BF16 or F16; RULE: ADAMW or SGD; SECOND: RANK1, BLOCKED, FACTORED or NONE.
//
// measure reads gradients and old codes and finds the statistics that apply cannot know from one pass;
// between the two, ranks may reduce them. apply updates parameters and stores the new moments. (vectors.cu
// then moves reduced row and column statistics into the state, when nobody reads the old ones any more.)

#ifndef BLOCKS_PER_SM
#define BLOCKS_PER_SM 3
#endif

DEVICE void load_tables(Tables& shared, const Tables* tables) {
  const u32* from = (const u32*)tables;
  u32* to = (u32*)&shared;
  for (u32 i = threadIdx.x; i < sizeof(Tables) / 4; i += blockDim.x) to[i] = from[i];
  __syncthreads();
}

extern "C" __global__ void __launch_bounds__(32 * WARPS, 4)
    measure(const Tile* tiles, const Slab* slabs, const Live* lives, const Hyper* hypers,
            const Tables* tables) {
  __shared__ Tables shared;
  load_tables(shared, tables);
  i32 warp = threadIdx.x / 32, lane_id = threadIdx.x & 31;
  Tile tile = tiles[blockIdx.x];
  const Slab& s = slabs[tile.slab];
  Live live = lives[tile.slab];
  const Hyper h = hypers[live.hyper];
  if (tile.group < 0) measure_shared_block(s, live, h, shared, tile, warp, lane_id);
#if SECOND == RANK1
  if (tile.group >= 0) measure_rank1(s, live, h, tile, warp, lane_id);
#elif SECOND == FACTORED
  if (tile.group >= 0) measure_factored(s, live, h, tile, warp, lane_id);
#endif
}

// A slab that keeps fp32 moments: FLAT_TILE consecutive elements.
DEVICE void apply_flat(const Slab& s, const Live& live, const Hyper& h, const Tile& tile, i32 warp,
                       i32 lane_id) {
  i64 start = (i64)tile.row0 * FLAT_TILE;
  for (i32 i = warp; i < FLAT_TILE / TILE_COLS; i += WARPS) {
    i64 at = start + i * TILE_COLS + lane_id * LANE_COLS;
    i64 left = s.numel - at;
    Lane lane(Span{0, left > 8 ? 8 : left > 0 ? (i32)left : 0}, 0);
    float param[8], grad[8], first[8], second[8];
    load_lane(PARAM(), live.param, at, lane, param);
    load_lane(GRAD(), live.grad, at, lane, grad);
    load_lane(F32(), s.m_codes, at, lane, first);
    if (h.maximize) negate8(grad);
#if SECOND != NONE
    load_lane(F32(), s.v_codes, at, lane, second);
#endif
#pragma unroll
    for (i32 k = 0; k < 8; ++k) {
      first[k] = new_first(h, first[k], grad[k], param[k]);
#if SECOND != NONE
      second[k] = new_second(h, second[k], grad[k]);
#else
      second[k] = 0.0f;
#endif
    }
    update8(h, param, grad, first, second, 0.0f, false);
    store_lane(PARAM(), live.param, at, lane, param);
    store_lane(F32(), s.m_codes, at, lane, first);
#if SECOND != NONE
    store_lane(F32(), s.v_codes, at, lane, second);
#endif
  }
}

// What a warp needs of its columns.
struct Columns {
#if SECOND == RANK1
  float old[8], inv[8], least;  // column maxima, reciprocals of the new ones, least old one
#elif SECOND == FACTORED
  float mean[8], overall, least, most;
#endif
  DEVICE Columns(const Slab& s, const Window& w, const Tile& tile) {
    i32 col = w.on || !w.fast ? w.col : larger(s.col0, tile.group * TILE_COLS);
#if SECOND == RANK1
    load_columns(s.v_col, s, col, old);
    load_columns(s.new_col, s, col, inv);
    least = old[0];
#pragma unroll
    for (i32 k = 0; k < 8; ++k) inv[k] = inverse(settle(inv[k])), least = min_or_nan(least, old[k]);
#elif SECOND == FACTORED
    load_columns(s.v_col, s, col, mean);
    overall = *(const float*)s.v_mean, least = most = mean[0];
#pragma unroll
    for (i32 k = 0; k < 8; ++k) least = min_or_nan(least, mean[k]), most = max_or_nan(most, mean[k]);
#endif
  }
};

// The statistics of a lane's row among the 32 of its warp, to be passed on by shuffles.
struct Row {
  float old, inv, top;  // rank-1: maximum, reciprocal of the new one, the new one; factored: old = rho
  DEVICE Row(const Slab& s, const Window& w, const Columns& c, i32 lane_id) : old(0), inv(0), top(0) {
    if (lane_id >= w.count) return;
#if SECOND == RANK1
    old = ((const float*)s.v_row)[w.row0 + lane_id];
    top = settle(((const float*)s.new_row)[w.row0 + lane_id]);
    inv = inverse(top);
#elif SECOND == FACTORED
    old = c.overall == 0.0f ? 0.0f : divide(((const float*)s.v_row)[w.row0 + lane_id], c.overall);
#endif
  }
};

template <bool FAST>
DEVICE void apply_rows(const Slab& s, const Live& live, const Hyper& h, const Tables& t, Window& w,
                       const Columns& c, i32 lane_id) {
  Row mine(s, w, c, lane_id);
  for (i32 i = 0; i < w.count; ++i) {
    i32 row = w.row0 + i;
    Span columns = FAST ? Span{s.col0, s.col1} : span(s, row);
    Lane lane(columns, w.col);
    Block block(s, columns, w.block, row, lane_id);
    float param[8], grad[8], first[8], second[8];
    bool tame = FAST;
    if (FAST) {
      load8(PARAM(), w.param, param);
      load8(GRAD(), w.grad, grad);
      signed_values8(t, load4(w.m_codes), first);
      scale8(first, load_float(w.m_absmax));
      if (h.maximize) negate8(grad);
    } else {
      load_lane(PARAM(), live.param, element(s, row, w.col), lane, param);
      load_gradient(s, live, h, row, lane, grad);
      old_first(s, t, row, lane, w.block, first);
    }
#if SECOND == RANK1 || SECOND == BLOCKED
    linear_values8(FAST ? load4(w.v_codes) : second_codes(s, row, lane), second);
#endif
#if SECOND == RANK1
    float row_old = __shfl_sync(FULL_MASK, mine.old, i), row_inv = __shfl_sync(FULL_MASK, mine.inv, i);
    float row_top = __shfl_sync(FULL_MASK, mine.top, i);
    tame &= min_or_nan(row_old, c.least) >= 64.0f * LEAST_RADICAND && row_top <= MOST;
#elif SECOND == BLOCKED
    float scale = 0.0f;
    if (FAST)
      scale = load_float(w.v_absmax);
    else if (lane.some())
      scale = ((const float*)s.v_row)[block.place];
    tame &= scale >= 64.0f * LEAST_RADICAND;
#elif SECOND == FACTORED
    float rho = __shfl_sync(FULL_MASK, mine.old, i);
    tame &= mul(rho, c.least) >= LEAST_RADICAND && mul(rho, c.most) <= MOST;
#endif
#pragma unroll
    for (i32 k = 0; k < 8; ++k) {
      first[k] = new_first(h, first[k], grad[k], param[k]);
#if SECOND == RANK1
      second[k] = new_second(h, mul(second[k], min_or_nan(row_old, c.old[k])), grad[k]);
#elif SECOND == BLOCKED
      second[k] = new_second(h, mul(second[k], scale), grad[k]);
#elif SECOND == FACTORED
      second[k] = mul(rho, c.mean[k]);
#else
      second[k] = 0.0f;
#endif
    }
    if (!FAST) zero_others(lane, first), zero_others(lane, second);
    float largest = largest8(first);
#if SECOND == BLOCKED
    float v_largest = largest8(second);
    tame &= v_largest <= MOST;
#endif
    update8(h, param, grad, first, second, largest, tame);
    if (FAST) {
      if (w.on) store8(PARAM(), w.param, param);
    } else if (lane.some()) {
      store_lane(PARAM(), live.param, element(s, row, w.col), lane, param);
    }
    float absmax = block_max(largest);
    if (!FAST && block.shared) absmax = ((const float*)s.new_m_absmax)[block.place];
    absmax = settle(absmax);
    u32 m_word = encode_signed8(t, first, absmax);
#if SECOND == RANK1
    u32 v_word = encode_linear8(second, [&](i32 k) { return max_or_nan(row_inv, c.inv[k]); });
#elif SECOND == BLOCKED
    float v_absmax = block_max(v_largest);
    if (!FAST && block.shared) v_absmax = ((const float*)s.new_v_absmax)[block.place];
    v_absmax = settle(v_absmax);
    float inv = inverse(v_absmax);
    u32 v_word = encode_linear8(second, [&](i32) { return inv; });
#endif
    bool writes = FAST ? w.on : lane.some(), leads = FAST ? w.leads : block.writes;
#if SECOND == RANK1 || SECOND == BLOCKED
    if (FAST && writes) store4(w.v_codes, v_word);
    if (!FAST && writes) store_codes(s.v_codes, code_byte(s, row, w.col), lane, v_word);
#endif
    if (FAST && writes) store4(w.m_codes, m_word);
    if (!FAST && writes) store_codes(s.m_codes, code_byte(s, row, w.col), lane, m_word);
    if (leads) {
      store_float(FAST ? w.m_absmax : s.m_absmax + 4 * block.place, absmax);
#if SECOND == BLOCKED
      store_float(FAST ? w.v_absmax : s.v_row + 4 * block.place, v_absmax);
#endif
    }
    if (FAST) w.next();
  }
}

extern "C" __global__ void __launch_bounds__(32 * WARPS, BLOCKS_PER_SM)
    apply(const Tile* tiles, const Slab* slabs, const Live* lives, const Hyper* hypers,
          const Tables* tables) {
  __shared__ Tables shared;
  load_tables(shared, tables);
  i32 warp = threadIdx.x / 32, lane_id = threadIdx.x & 31;
  Tile tile = tiles[blockIdx.x];
  Live live = lives[tile.slab];
  if (!live.active) return;  // whole blocks; no barrier follows
  const Slab& s = slabs[tile.slab];
  const Hyper h = hypers[live.hyper];
  if (s.kind == FP32_MOMENTS) {
    apply_flat(s, live, h, tile, warp, lane_id);
    return;
  }
  Window w(s, live, tile, warp, lane_id);
  if (w.count == 0) return;  // whole warps
  Columns columns(s, w, tile);
  if (w.fast)
    apply_rows<true>(s, live, h, shared, w, columns, lane_id);
  else
    apply_rows<false>(s, live, h, shared, w, columns, lane_id);
}
