// The fused optimizer step. Compiled once for each combination of
//   PARAM, GRAD: F32, BF16 or F16; RULE: ADAMW or SGD; SECOND: RANK1, BLOCKED, FACTORED or NONE.
//
// measure reads gradients and old codes and finds the statistics that apply cannot know from one pass;
// between the two, ranks may reduce them. apply updates parameters and stores the new moments. (vectors.cu
// then moves reduced row and column statistics into the state, when nobody reads the old ones any more.)

// Thread blocks of apply at a time: 64 registers a thread, or 80 where that would spill (fp32 parameters or
// gradients under rank-1).
#if SECOND == BLOCKED && __CUDA_ARCH__ >= 1000  // there 64 registers spill with 32-bit types
#define BLOCKS_PER_SM (PARAM::vectors + GRAD::vectors > 2 ? 3 : 4)
#else
#define BLOCKS_PER_SM (SECOND == RANK1 && PARAM::vectors + GRAD::vectors > 2 ? 3 : 4)
#endif
#if SECOND == RANK1 && __CUDA_ARCH__ >= 1000  // likewise, of measure: there 64 registers spill
#define MEASURE_BLOCKS_PER_SM 3
#else
#define MEASURE_BLOCKS_PER_SM 4
#endif

DEVICE void load_tables(Tables& shared, const Tables* tables) {
  const u32* from = (const u32*)tables;
  u32* to = (u32*)&shared;
  for (u32 i = threadIdx.x; i < sizeof(Tables) / 4; i += blockDim.x) to[i] = from[i];
  __syncthreads();
}

extern "C" __global__ void __launch_bounds__(32 * WARPS, MEASURE_BLOCKS_PER_SM)
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
    orient8(h, grad);
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

// Statistics of a tile's columns, in shared memory: RANK1: maxima and reciprocals of the new ones; FACTORED:
// means.
struct Columns {
#if SECOND == RANK1
  float old[TILE_COLS], inv[TILE_COLS];
#else
  float old[SECOND == FACTORED ? TILE_COLS : 1];
#endif
};

DEVICE void load_columns(const Slab& s, const Tile& tile, Columns& columns) {
#if SECOND == RANK1 || SECOND == FACTORED
  i32 col = tile.group * TILE_COLS + (i32)threadIdx.x;
  bool stored = col >= s.col0 && col < s.col1;
  columns.old[threadIdx.x] = stored ? ((const float*)s.v_col)[col - s.col0] : 0.0f;
#endif
#if SECOND == RANK1
  columns.inv[threadIdx.x] = stored ? inverse(settle(((const float*)s.new_col)[col - s.col0])) : 0.0f;
#endif
}

// The statistics of a lane's row among the 32 of its warp, to be passed on by shuffles.
struct Row {
  float old, inv, top;  // rank-1: maximum, reciprocal of the new one, the new one; factored: old = rho
  u32 drawn;            // for stochastic rounding
  DEVICE Row(const Slab& s, const Hyper& h, const Window& w, i32 lane_id) : old(0), inv(0), top(0), drawn(0) {
    if (lane_id >= w.count) return;
    i32 row = w.row0 + lane_id;
    if (h.draw != 0) drawn = drawn_row(h.draw, s.numbers != 0 ? ((const u32*)s.numbers)[row] : s.row0 + (u32)row);
#if SECOND == RANK1
    old = ((const float*)s.v_row)[row];
    top = settle(((const float*)s.new_row)[row]);
    inv = inverse(top);
#elif SECOND == FACTORED
    float mean = *(const float*)s.v_mean;
    old = mean == 0.0f ? 0.0f : divide(((const float*)s.v_row)[row], mean);
#endif
  }
};

// The second moment's codes of a lane's columns in the warp's i-th row, by the rounding asked for.
template <class Inverse>
DEVICE u32 encode8(const float* x, Inverse inv, const Hyper& h, const Row& mine, i32 i, i32 col) {
  if (h.draw == 0) return encode_linear8(x, inv);
  return encode_drawn8(x, inv, drawn_hash(__shfl_sync(FULL_MASK, mine.drawn, i), (u32)col / LANE_COLS));
}

#define LATE_PARAM (RULE == ADAMW)  // a staged parameter is read where it is needed, which saves registers

template <bool FAST>
DEVICE void apply_rows(const Slab& s, const Live& live, const Hyper& h, const Tables& t, const Window& w,
                       const Columns& c, Stage* stages, i32 lane_id) {
  constexpr bool staged = FAST && STAGED;
  if (staged) stages[0].fetch(w, 0, lane_id);
  Row mine(s, h, w, lane_id);
#if SECOND == RANK1 || SECOND == FACTORED
  float by_column[8], least_column, most_column;
  read8(c.old + w.local, by_column);
  least_column = most_column = by_column[0];
#pragma unroll
  for (i32 k = 1; k < 8; ++k) {
    least_column = min_or_nan(least_column, by_column[k]);
    most_column = max_or_nan(most_column, by_column[k]);
  }
#endif
  for (i32 i = 0; i < w.count; ++i) {
    i32 row = w.row0 + i;
    Span columns = FAST ? Span{s.col0, s.col1} : span(s, row);
    Lane lane(columns, w.col);
    Block block(s, columns, w.block, row, lane_id);
    float param[8], grad[8], first[8], second[8];
    bool tame = FAST;
    const Stage& here = stages[staged ? i % STAGES : 0];
    if (staged) {
      stages[(i + 1) % STAGES].fetch(w, i + 1, lane_id);
      wait_copies<1>();
    }
    if (FAST) {
      if (staged) {
        if (!LATE_PARAM) Stage::read(PARAM(), here.param, lane_id, param);
        Stage::read(GRAD(), here.grad, lane_id, grad);
      } else {
        load8(PARAM(), w.param_at(i), param);
        load8(GRAD(), w.grad_at(i), grad);
      }
      signed_values8(t, staged ? here.m_codes[lane_id] : load4(w.m_codes_at(i)), first);
      scale8(first, staged ? here.m_absmax[lane_id] : load_float(w.m_absmax_at(i)));
      orient8(h, grad);
    } else {
      load_lane(PARAM(), live.param, element(s, row, w.col), lane, param);
      load_gradient(s, live, h, row, lane, grad);
      old_first(s, t, row, lane, w.block, first);
    }
#if SECOND == RANK1 || SECOND == BLOCKED
    linear_values8(staged ? here.v_codes[lane_id] : FAST ? load4(w.v_codes_at(i)) : second_codes(s, row, lane), second);
#endif
#if SECOND == RANK1
    float row_old = __shfl_sync(FULL_MASK, mine.old, i), row_inv = __shfl_sync(FULL_MASK, mine.inv, i);
    float row_top = __shfl_sync(FULL_MASK, mine.top, i);
    tame &= min_or_nan(row_old, least_column) >= 64.0f * LEAST_RADICAND && row_top <= MOST;
#elif SECOND == BLOCKED
    float scale = 0.0f;
    if (FAST)
      scale = staged ? here.v_absmax[lane_id] : load_float(w.v_absmax_at(i));
    else if (lane.some())
      scale = ((const float*)s.v_row)[block.place];
    tame &= scale >= 64.0f * LEAST_RADICAND;
#elif SECOND == FACTORED
    float rho = __shfl_sync(FULL_MASK, mine.old, i);
    tame &= mul(rho, least_column) >= LEAST_RADICAND && mul(rho, most_column) <= MOST;
#endif
#if SECOND == RANK1 || SECOND == FACTORED
    read8(c.old + w.local, by_column);
#endif
#pragma unroll
    for (i32 k = 0; k < 8; ++k) {
      first[k] = new_first(h, first[k], grad[k], param[k]);
#if SECOND == RANK1
      second[k] = new_second(h, mul(second[k], min_or_nan(row_old, by_column[k])), grad[k]);
#elif SECOND == BLOCKED
      second[k] = new_second(h, mul(second[k], scale), grad[k]);
#elif SECOND == FACTORED
      second[k] = mul(rho, by_column[k]);
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
    auto finish = [&](float stat, bool is_second) {
      if (!FAST && block.shared)
        stat = ((const float*)(is_second ? s.new_v_absmax : s.new_m_absmax))[block.place];
      stat = settle(stat);
      return Scale{stat, inverse(stat)};
    };
    Scale m;
#if SECOND == BLOCKED
    Scale v;
    block_max2(largest, v_largest, lane_id, finish, m, v);
    u32 v_word = encode8(second, [&](i32) { return v.inv; }, h, mine, i, w.col);
#else
    m = finish(block_max(largest), false);
#endif
#if SECOND == RANK1
    float four[4];  // of the columns' reciprocals: all eight at once need registers too many
    auto inverse_at = [&](i32 k) {
      if (k % 4 == 0) read4(c.inv + w.local + k, four);
      return max_or_nan(row_inv, four[k % 4]);
    };
    u32 v_word = encode8(second, inverse_at, h, mine, i, w.col);
#endif
    u32 m_word = encode_signed8(t, first, m.stat, m.inv);
    bool leads = FAST ? w.leads : block.writes;
#if SECOND == RANK1 || SECOND == BLOCKED
    if (FAST) store4_if(w.on, w.v_codes_at(i), v_word);
    if (!FAST && lane.some()) store_codes(s.v_codes, code_byte(s, row, w.col), lane, v_word);
#endif
    if (FAST) store4_if(w.on, w.m_codes_at(i), m_word);
    if (!FAST && lane.some()) store_codes(s.m_codes, code_byte(s, row, w.col), lane, m_word);
    store4_if(leads, FAST ? w.m_absmax_at(i) : s.m_absmax + 4 * block.place, __float_as_uint(m.stat));
#if SECOND == BLOCKED
    store4_if(leads, FAST ? w.v_absmax_at(i) : s.v_row + 4 * block.place, __float_as_uint(v.stat));
#endif
    if (h.ahead != 0.0f) lead8(h, t, m_word, m.stat, first);
    if (staged && LATE_PARAM) Stage::read(PARAM(), here.param, lane_id, param);
    update8(h, param, grad, first, second, largest, tame);
    if (FAST) {
      store8(PARAM(), w.param_at(i), param, w.on);
    } else if (lane.some()) {
      store_lane(PARAM(), live.param, element(s, row, w.col), lane, param);
    }
  }
}

extern "C" __global__ void __launch_bounds__(32 * WARPS, BLOCKS_PER_SM)
    apply(const Tile* tiles, const Slab* slabs, const Live* lives, const Hyper* hypers,
          const Tables* tables) {
  __shared__ Tables shared;
  __shared__ __align__(16) Columns columns;
  __shared__ Stage stages[STAGED ? WARPS : 1][STAGED ? STAGES : 1];
  i32 warp = threadIdx.x / 32, lane_id = threadIdx.x & 31;
  Tile tile = tiles[blockIdx.x];
  Live live = lives[tile.slab];
  if (!live.active) return;  // whole blocks
  const Slab& s = slabs[tile.slab];
  const Hyper h = hypers[live.hyper];
  if (s.kind == FP32_MOMENTS) {
    apply_flat(s, live, h, tile, warp, lane_id);
    return;
  }
  load_columns(s, tile, columns);
  load_tables(shared, tables);  // ends with a barrier
  Window w(s, live, tile, warp, lane_id);
  if (w.fast)
    apply_rows<true>(s, live, h, shared, w, columns, stages[STAGED ? warp : 0], lane_id);
  else
    apply_rows<false>(s, live, h, shared, w, columns, stages[STAGED ? warp : 0], lane_id);
}
