// Small kernels on the row and column statistics of slabs. A thread block takes one tile: elements
// [row0, row0 + rows) of the rows' (group ROWS) or the columns' (COLS) vector of a slab, or its MEAN.
#define ROWS 0
#define COLS 1
#define MEAN 2

DEVICE bool find_tile(const Tile* tiles, const Live* lives, Tile& tile) {
  tile = tiles[blockIdx.x];
  return lives[tile.slab].active;
}

// What ranks agreed on becomes a batch's activity. places: of each work's flag, 0 where it has no other ranks;
// flags[0]: a rank failed, so that nothing may change.
extern "C" __global__ void agree(Live* lives, const i32* places, const float* flags, i32 count) {
  i32 i = (i32)(blockIdx.x * blockDim.x + threadIdx.x);
  if (i >= count) return;
  if (flags[0] != 0.0f)
    lives[i].active = 0;
  else if (places[i] != 0)
    lives[i].active = flags[places[i]] != 0.0f;
}

// Rank-1: settled new maxima become the state.
extern "C" __global__ void commit(const Tile* tiles, const Slab* slabs, const Live* lives) {
  Tile tile;
  if (!find_tile(tiles, lives, tile)) return;
  const Slab& s = slabs[tile.slab];
  const float* from = (const float*)(tile.group == COLS ? s.new_col : s.new_row) + tile.row0;
  float* to = (float*)(tile.group == COLS ? s.v_col : s.v_row) + tile.row0;
  for (i32 i = threadIdx.x; i < tile.rows; i += blockDim.x) to[i] = settle(from[i]);
}

// Factored: sums of squares of whole rows and columns from measure's partial sums, in a fixed order.
extern "C" __global__ void gather_sums(const Tile* tiles, const Slab* slabs) {
  Tile tile = tiles[blockIdx.x];
  const Slab& s = slabs[tile.slab];
  i32 width = s.col1 - s.col0;
  i32 stride = tile.group == COLS ? width : s.rows;
  i32 parts = tile.group == COLS ? (s.rows + TILE_ROWS - 1) / TILE_ROWS
                         : (s.col1 + TILE_COLS - 1) / TILE_COLS - s.col0 / TILE_COLS;
  const float* from = (const float*)(tile.group == COLS ? s.part_col : s.part_row) + tile.row0;
  double* to = (double*)(tile.group == COLS ? s.new_col : s.new_row) + tile.row0;
  for (i32 i = threadIdx.x; i < tile.rows; i += blockDim.x) {
    double sum = 0.0;
    for (i32 part = 0; part < parts; ++part) sum += to_double(from[(i64)part * stride + i]);
    to[i] = sum;
  }
}

// Factored: the sum over all of a slab, one thread block each, from its rows' sums.
extern "C" __global__ void total(const i32* numbers, const Slab* slabs) {
  __shared__ double partial[256];
  const Slab& s = slabs[numbers[blockIdx.x]];
  double sum = 0.0;
  for (i32 i = threadIdx.x; i < s.rows; i += 256) sum += ((const double*)s.new_row)[i];
  partial[threadIdx.x] = sum;
  __syncthreads();
  for (i32 half = 128; half > 0; half /= 2) {
    if ((i32)threadIdx.x < half) partial[threadIdx.x] += partial[threadIdx.x + half];
    __syncthreads();
  }
  if (threadIdx.x == 0) *(double*)s.new_sum = partial[0];
}

DEVICE float advanced(const Hyper& h, float old, double sum, double count) {
  return add(mul(old, h.c), mul(to_float(sum / count), h.d));
}

// Factored: means of the state advance by the (reduced) sums.
extern "C" __global__ void advance_means(const Tile* tiles, const Slab* slabs, const Live* lives,
                                         const Hyper* hypers) {
  Tile tile;
  if (!find_tile(tiles, lives, tile)) return;
  const Slab& s = slabs[tile.slab];
  const Hyper& h = hypers[lives[tile.slab].hyper];
  double rows = (double)s.all_rows, cols = (double)s.cols;
  if (tile.group == MEAN) {
    float* mean = (float*)s.v_mean;
    if (threadIdx.x == 0) *mean = advanced(h, *mean, *(const double*)s.new_sum, rows * cols);
    return;
  }
  const double* from = (const double*)(tile.group == COLS ? s.new_col : s.new_row) + tile.row0;
  float* to = (float*)(tile.group == COLS ? s.v_col : s.v_row) + tile.row0;
  double count = tile.group == COLS ? rows : cols;
  for (i32 i = threadIdx.x; i < tile.rows; i += blockDim.x) to[i] = advanced(h, to[i], from[i], count);
}
