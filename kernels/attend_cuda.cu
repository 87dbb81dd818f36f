// One decode step of grouped-query attention over packed keys and values in fragment order, and over tokens in full precision.
//
// Tokens (scores) and channels (output) are the rows of mma.sync m16n8k16, up to 8 query heads of one key/value head its columns.
// A masked field of a word, in place, is a half-precision subnormal, code * 2^(bit - 24), exact in the matrix units. Lane 4 g + t of a
// word holds the fields of rows g and g + 8 (row half rr) and of columns 2 t + e and 2 t + 8 + e (column half kh):
//     keys    bit 16 e + 8 (token tile) + 4 rr + 2 kh (+ parity of the k-step, 1-bit codes)
//     values  bit 16 e + 8 (k-step)     + 4 rr + 2 kh (+ parity of the channel tile, 1-bit codes)
// The power of two of a column goes into the other operand (query, probabilities), that of a row into the softmax or the final scale.
// Key scales multiply the query, value scales the accumulators. The order of bytes in a record is that of fragments.py.
//
// Compile-time constants, set by attend_cuda.py:
//   WIDTH           channels of query and values, 64 or 128
//   KEY_STEPS       k-steps of 16 key channels; WIDE_STEPS of them, the first ones, have 2-bit codes
//   STORED_STEPS    first k-steps that have a stored offset
//   CHANNELS, WIDE_CHANNELS, CENTRED_FROM   key channels, those with 2-bit codes, and the first one whose middle code is not 0
//   TERNARY_FROM, TERNARY_TO   key channels with codes 0, 1, 2, from the first one to before the second
//   CHUNKS          blocks of 32 tokens in a record, which share metadata
//   METADATA_BITS   of scales and offsets: 16, or 4, which a unit (and for offsets a center) of each channel gives a meaning
//   VALUE_BITS, VALUE_CENTRE (twice the middle code, if codes are centred, else 0), VALUE_STORED (offset in metadata)
//   VALUE_SCALE     0 none, 1 per channel, 2 per token in groups of 32 channels
//   RECORDS, WARPS, MIN_BLOCKS   records a warp takes at a time, warps a block, blocks a multiprocessor
//   BRAIN           query, residual and output are bfloat16
//   ORDERED         scores are of the query with its channels in another order; MAPPED: times a matrix; CENTERED: and of the query
//                   itself times a constant vector besides
//   PROTECTED       values of marked tokens lie in records of their own, 2-bit codes with scales and minima per channel
//
// Protected tokens: keys lie token after token, values in two runs of records, each token after token. A warp goes through keys and
// sorts probabilities into two queues in shared memory, one for each run; as soon as a queue has what records need, they are read.
// Runs are cut where the keys of a warp begin and end: entries of a record that belong to others count with probability 0.

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef long long i64;

#if __CUDA_ARCH__ >= 900
#define BULK 1
#else
#define BULK 0
#endif

constexpr int NARROW_STEPS = KEY_STEPS - WIDE_STEPS;
constexpr int TILES = WIDTH / 16;
constexpr int RECORD_TOKENS = 32 * CHUNKS;
constexpr int KEY_CODES = WIDE_STEPS * 128 + NARROW_STEPS * 64;
constexpr int KEY_PAIRS = (KEY_STEPS + 1) / 2;
constexpr int STORED_PAIRS = (STORED_STEPS + 1) / 2;
constexpr int KEY_SCALE_AT = CHUNKS * KEY_CODES;
constexpr int KEY_OFFSET_AT = KEY_SCALE_AT + KEY_PAIRS * 64;
constexpr int KEY_RECORD =
    METADATA_BITS == 4 ? KEY_SCALE_AT + KEY_STEPS * 16 : KEY_OFFSET_AT + (STORED_STEPS / 2) * 64 + (STORED_STEPS % 2) * 32;
constexpr int FACTOR_PAIR = CENTRED_FROM / 32;
constexpr int FACTOR_PAIRS = CENTRED_FROM < CHANNELS ? KEY_PAIRS - FACTOR_PAIR : 0;
constexpr int OFFSET_PAIRS = STORED_PAIRS + FACTOR_PAIRS;
constexpr int OFFSET_ROWS = METADATA_BITS == 4 ? KEY_STEPS : OFFSET_PAIRS;
constexpr int VALUE_CODES = TILES * 64 * VALUE_BITS;
constexpr int VALUE_WORDS = TILES * VALUE_BITS / 2;
constexpr int VALUE_METADATA = VALUE_SCALE == 1 ? WIDTH * METADATA_BITS / 8 : VALUE_SCALE == 2 ? WIDTH * 2 * CHUNKS : 0;
constexpr int VALUE_SCALE_AT = CHUNKS * VALUE_CODES;
constexpr int VALUE_OFFSET_AT = VALUE_SCALE_AT + VALUE_METADATA;
constexpr int VALUE_RECORD = VALUE_OFFSET_AT + (VALUE_STORED || METADATA_BITS == 4 ? VALUE_METADATA : 0);
constexpr int TOKEN_GROUPS = WIDTH / 32;
constexpr int MAPPED_ROW = KEY_STEPS * 16 + 4;
constexpr int QUERY_ROW = WIDTH + 8;
constexpr int MAPPED_BYTES = 8 * (MAPPED_ROW * 4 > QUERY_ROW * 2 ? MAPPED_ROW * 4 : QUERY_ROW * 2);
constexpr int KEY_CHANNELS = KEY_STEPS * 16;
constexpr int UNIT_BYTES = 3 * 2 * (KEY_CHANNELS + WIDTH);
constexpr int STEP_ROW = (KEY_STEPS + 3) / 4 * 4;
constexpr int CHOSEN_OFFSET_AT = CHUNKS * TILES * 128 + WIDTH * 2;
constexpr int CHOSEN_RECORD = CHOSEN_OFFSET_AT + WIDTH * 2;
constexpr int CHOSEN_RECORDS = 2;  // protected ones, taken at a time
constexpr int VALUE_PLACES = RECORDS + PROTECTED;  // keys of RECORDS may need one record more, since its entries begin anywhere in one
// Entries that a queue has room for: less than what is taken at a time are left when a step adds its own.
constexpr int QUEUE = (RECORDS > 1 ? 2 * RECORDS : RECORDS + CHOSEN_RECORDS + 1) * RECORD_TOKENS;
constexpr int CHOSEN_AT = RECORDS * KEY_RECORD + VALUE_PLACES * VALUE_RECORD;
constexpr int QUEUES_AT = CHOSEN_AT + CHOSEN_RECORDS * CHOSEN_RECORD;  // rows of 8 heads: others, protected, and one for what is not held
constexpr int SLOT = PROTECTED ? QUEUES_AT + (2 * QUEUE + 1) * 16 : CHOSEN_AT;
constexpr int BARRIERS = PROTECTED ? 32 : 16;  // bytes of a warp
// Barriers come first, and nothing else ever lies there: what was written over one was lost while other processes used the GPU (NOTES.md).
constexpr int SLOTS_AT = (WARPS * BARRIERS + 127) / 128 * 128;
constexpr float NEVER = -3e38f;
constexpr float LOWEST = -1e30f;
constexpr float GROWTH = 8.f;
constexpr float CODE_UNIT = 5.9604644775390625e-8f;  // 2^-24
// Codes of 4 bits are masked in place like others: offsets in units of 2^-24, scales of 2^-20.
constexpr u32 OFFSET_MASK = 0x000f000fu, SCALE_MASK = 0x00f000f0u;
constexpr float SCALE_FIELD = METADATA_BITS == 4 ? 1048576.f : 1.f;

static_assert(METADATA_BITS == 16 || MAPPED, "with metadata of 4 bits, attend_cuda.py gives a matrix");
static_assert(KEY_RECORD % 16 == 0 && VALUE_RECORD % 16 == 0, "records are copied in pieces of 16 bytes");
static_assert(!PROTECTED || (QUEUE & (QUEUE - 1)) == 0, "places in queues are taken modulo their size");

__device__ __forceinline__ u32 shared_address(const void* p) { return (u32)__cvta_generic_to_shared(p); }
__device__ __forceinline__ float as_float(u32 x) { return __uint_as_float(x); }
__device__ __forceinline__ u32 multiply(u32 a, u32 b) { u32 d; asm("mul.rn.f16x2 %0, %1, %2;" : "=r"(d) : "r"(a), "r"(b)); return d; }
__device__ __forceinline__ u32 larger(u32 a, u32 b) { u32 d; asm("max.f16x2 %0, %1, %2;" : "=r"(d) : "r"(a), "r"(b)); return d; }
__device__ __forceinline__ u32 transpose(u32 a) {
  u32 d;
  asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(d) : "r"(a));
  return d;
}
__device__ __forceinline__ float exp2_fast(float x) { float y; asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x)); return y; }
__device__ __forceinline__ float log2_fast(float x) { float y; asm("lg2.approx.f32 %0, %1;" : "=f"(y) : "f"(x)); return y; }
__device__ __forceinline__ float power(int e) { return as_float((u32)(e + 127) << 23); }
__device__ __forceinline__ u32 pack_half(float low, float high) {
  u32 d;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(d) : "f"(high), "f"(low));
  return d;
}
__device__ __forceinline__ u32 pack_brain(float low, float high) {
  u32 d;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(d) : "f"(high), "f"(low));
  return d;
}
__device__ __forceinline__ float half_low(u32 x) {
  float y;
  asm("{ .reg .f16 l, h; mov.b32 {l, h}, %1; cvt.f32.f16 %0, l; }" : "=f"(y) : "r"(x));
  return y;
}
__device__ __forceinline__ float half_high(u32 x) {
  float y;
  asm("{ .reg .f16 l, h; mov.b32 {l, h}, %1; cvt.f32.f16 %0, h; }" : "=f"(y) : "r"(x));
  return y;
}
#if BRAIN
__device__ __forceinline__ float input_low(u32 x) { return as_float(x << 16); }
__device__ __forceinline__ float input_high(u32 x) { return as_float(x & 0xffff0000u); }
__device__ __forceinline__ u32 pack_input(float low, float high) { return pack_brain(low, high); }
constexpr u32 INPUT_ONES = 0x3f803f80u;
#else
__device__ __forceinline__ float input_low(u32 x) { return half_low(x); }
__device__ __forceinline__ float input_high(u32 x) { return half_high(x); }
__device__ __forceinline__ u32 pack_input(float low, float high) { return pack_half(low, high); }
constexpr u32 INPUT_ONES = 0x3c003c00u;
#endif
constexpr u32 HALF_QUARTER = 0x34003400u, HALF_1 = 0x3c003c00u, HALF_4 = 0x44004400u;

__device__ __forceinline__ void mma(float (&d)[4], u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1, const float (&c)[4]) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%10,%11,%12,%13};"
      : "=f"(d[0]), "=f"(d[1]), "=f"(d[2]), "=f"(d[3])
      : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1), "f"(c[0]), "f"(c[1]), "f"(c[2]), "f"(c[3]));
}
__device__ __forceinline__ void mma_input(float (&d)[4], u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
#if BRAIN
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]) : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
#else
  mma(d, a0, a1, a2, a3, b0, b1, d);
#endif
}

__device__ __forceinline__ void start_dependents() {
#if BULK
  asm volatile("griddepcontrol.launch_dependents;");
#endif
}
__device__ __forceinline__ void wait_for_previous() {
#if BULK
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// What the kernel in front wrote, to be read after `wait_for_previous`: not to be moved in front of it, as loads from const memory may.
__device__ __forceinline__ float read_fresh(const float* p) {
  float x;
  asm volatile("ld.global.f32 %0, [%1];" : "=f"(x) : "l"(p) : "memory");
  return x;
}
__device__ __forceinline__ float4 read_fresh(const float4* p) {
  float4 x;
  asm volatile("ld.global.v4.f32 {%0, %1, %2, %3}, [%4];" : "=f"(x.x), "=f"(x.y), "=f"(x.z), "=f"(x.w) : "l"(p) : "memory");
  return x;
}

// Copies of one warp, one for keys and one for values in flight. With bulk copies each side has a barrier; without, each copy is a
// group, and they alternate, so that all but the newest having arrived means that the one wanted has. With protected tokens there are
// three sides, which do not alternate.
struct Copies {
  u32 barrier;
  unsigned long long read_once;
  __device__ __forceinline__ void init(u32 at, int lane) {
    barrier = at;
#if BULK
    asm volatile("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(read_once));
    if (lane == 0) {
      asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(barrier) : "memory");
      asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(barrier + 8) : "memory");
      if (PROTECTED) asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(barrier + 16) : "memory");
      asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    }
#endif
  }
  __device__ __forceinline__ void start(int side, u32 to, const u8* from, int bytes, int lane) {
#if BULK
    if (lane == 0 && bytes > 0) {
      const u32 b = barrier + 8 * side;
      asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(b), "r"(bytes) : "memory");
      asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint [%0], [%1], %2, [%3], %4;" ::"r"(to),
                   "l"(from), "r"(bytes), "r"(b), "l"(read_once) : "memory");
    }
#else
    for (int i = lane * 16; i < bytes; i += 512)
      asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(to + i), "l"(from + i) : "memory");
    asm volatile("cp.async.commit_group;" ::: "memory");
#endif
  }
  __device__ __forceinline__ void wait(int side, int phase) {
#if BULK
    asm volatile("{ .reg .pred p; L: mbarrier.try_wait.parity.shared::cta.b64 p, [%0], %1; @p bra D; bra L; D: }"
                 ::"r"(barrier + 8 * side), "r"(phase) : "memory");
#else
    asm volatile("cp.async.wait_group %0;" ::"n"(PROTECTED ? 0 : 1) : "memory");
    __syncwarp();
#endif
  }
};

// N words of this lane, of so many, as fragments.py stores them: fours, then two, then one.
template <int N, int LANES = 32>
__device__ __forceinline__ void load_words(u32 (&words)[N > 0 ? N : 1], const u8* from, int lane) {
  constexpr int row = 4 * LANES;
#pragma unroll
  for (int i = 0; i + 4 <= N; i += 4) *reinterpret_cast<uint4*>(words + i) = *reinterpret_cast<const uint4*>(from + i * row + lane * 16);
  constexpr int done = N / 4 * 4;
  if constexpr (N % 4 >= 2) {
    const uint2 two = *reinterpret_cast<const uint2*>(from + done * row + lane * 8);
    words[done] = two.x;
    words[done + 1] = two.y;
  }
  if constexpr (N % 2) words[N - 1] = *reinterpret_cast<const u32*>(from + (N - 1) * row + lane * 4);
}

// One field of a word as an operand of the matrix units: rows g and g + 8, columns 2 t and 2 t + 8.
template <int BITS>
struct Fields {
  u32 a0, a1, a2, a3;
  __device__ __forceinline__ Fields(u32 word, int parity) {
    const u32 mask = (BITS == 2 ? 0x00030003u : 0x00010001u) << parity;
    a0 = word & mask;
    a1 = word & (mask << 4);
    a2 = word & (mask << 2);
    a3 = word & (mask << 6);
  }
};

template <int VALUE>
struct Number {
  static constexpr int value = VALUE;
};

struct Part {  // tokens in full precision
  u16* keys;
  u16* values;
  i64 key_batch, key_head, key_token, value_batch, value_head, value_token;
};

struct Fresh {  // one more token of each sequence, which is written behind the residual
  const u16* keys;
  const u16* values;
  i64 key_batch, key_head, value_batch, value_head;
};

struct Chosen {  // protected tokens
  const u8* values;   // [B, H, capacity, CHOSEN_RECORD]
  const u32* marks;   // [B, blocks], bit i: token i of a block of 32 is protected
  const int* before;  // [B, blocks], protected tokens of the sequence in front of a block
  i64 capacity, blocks;
};

// What this block does. Read anew whenever it is made, so that nothing of it need be kept in registers.
struct Share {
  int split, splits, batch, head, first_head, head_count;  // up to 8 query heads of a key/value head
  i64 query_row;
  __device__ __forceinline__ Share(int heads, int ratio) {
    int y;
    asm volatile("mov.u32 %0, %ctaid.x; mov.u32 %1, %ctaid.y; mov.u32 %2, %ctaid.z; mov.u32 %3, %nctaid.x;"
                 : "=r"(split), "=r"(y), "=r"(batch), "=r"(splits));
    const int head_blocks = ratio <= 8 ? 1 : (ratio + 7) / 8;
    head = head_blocks == 1 ? y : y / head_blocks;
    first_head = (y - head * head_blocks) * 8;
    head_count = min(8, ratio - first_head);
    query_row = (i64)(batch * heads + head) * ratio + first_head;
  }
};

__device__ __forceinline__ float middle(int channel) {
  if (channel < CENTRED_FROM || channel >= CHANNELS) return 0.f;
  return channel >= TERNARY_FROM && channel < TERNARY_TO ? 1.f : channel < WIDE_CHANNELS ? 1.5f : 0.5f;
}
__device__ __forceinline__ int channel_of(int tile, int row_half, int g) {
  return 32 * (tile >> 1) + 8 * (g >> 1) + 4 * (tile & 1) + 2 * row_half + (g & 1);
}

extern "C" __global__ void __launch_bounds__(WARPS * 32, MIN_BLOCKS)
attend(int heads, int ratio, u32 reciprocal, float exponent_scale, const u8* __restrict__ order, i64 order_batch, i64 order_head,
       const int* __restrict__ lengths, const int* __restrict__ residual_lengths, const int* __restrict__ prefix_lengths,
       const u8* __restrict__ keys, const u8* __restrict__ values, i64 capacity, const u16* __restrict__ query,
       const float* __restrict__ key_scale_max, const float* __restrict__ value_scale_max, const u8* __restrict__ matrix, Fresh fresh,
       Part residual, const u16* __restrict__ key_units, const u16* __restrict__ value_units, const float* __restrict__ center,
       i64 center_batch, i64 center_head, Chosen chosen, float* __restrict__ partial, float* __restrict__ partial_weight,
       u16* __restrict__ out, Part prefix) {
  extern __shared__ __align__(128) u8 shared[];
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, g = lane >> 2, t = lane & 3;
  const Share block(heads, ratio);
  const int split = block.split, splits = block.splits, batch = block.batch, head = block.head, bh = batch * heads + head;
  const int first_head = block.first_head, head_count = block.head_count;
  const i64 query_row = block.query_row;
  start_dependents();

  // Everything small is asked for before the first of it is needed.
#if ORDERED
  constexpr int OWN_TILES = (TILES + WARPS - 1) / WARPS;  // every warp brings some tiles of the query into order
  u32 places[OWN_TILES][2];
#pragma unroll
  for (int i = 0; i < OWN_TILES; i++)
#pragma unroll
    for (int kh = 0; kh < 2; kh++)
      places[i][kh] = *reinterpret_cast<const u16*>(order + batch * order_batch + head * order_head
                                                    + 16 * min(warp + i * WARPS, TILES - 1) + 8 * kh + 2 * t);
#endif
  const int length = keys ? lengths[batch] : 0;
  const int fresh_place = residual_lengths[batch], residual_length = fresh_place + (fresh.keys ? 1 : 0);
  const int prefix_length = prefix_lengths ? prefix_lengths[batch] : 0;
  // The fresh token is written behind the residual by one warp of its head; nobody reads it from there in this launch.
  const bool writes_fresh = fresh.keys && split == 0 && warp == 0 && first_head == 0 && lane < WIDTH / 4;
  const int piece = lane % (WIDTH / 8) * 8;
  uint4 fresh_piece;
  if (writes_fresh)
    fresh_piece = *reinterpret_cast<const uint4*>(piece + (lane < WIDTH / 8 ? fresh.keys + batch * fresh.key_batch + head * fresh.key_head
        : fresh.values + batch * fresh.value_batch + head * fresh.value_head));
  const float key_bound = keys ? key_scale_max[bh] : 1.f, value_bound = keys && VALUE_SCALE == 2 ? value_scale_max[bh] : 1.f;
  u32 words[TILES][2];
#pragma unroll
  for (int j = 0; j < TILES; j++)
#pragma unroll
    for (int kh = 0; kh < 2; kh++)
      words[j][kh] = g < head_count ? *reinterpret_cast<const u32*>(query + (query_row + g) * WIDTH + 16 * j + 8 * kh + 2 * t) : 0u;
#if MAPPED
  constexpr int OWN_STEPS = (KEY_STEPS + WARPS - 1) / WARPS;  // every warp maps the query to some steps of 16 key channels
  uint4 columns[OWN_STEPS][TILES];
#pragma unroll
  for (int i = 0; i < OWN_STEPS; i++)
#pragma unroll
    for (int j = 0; j < TILES; j++)
      columns[i][j] = reinterpret_cast<const uint4*>(matrix)[(min(warp + i * WARPS, KEY_STEPS - 1) * TILES + j) * 32 + lane];
#endif

#if METADATA_BITS == 4
  // Units of scales, units and centers of offsets: first of keys, then of values in the order of lanes g.
  constexpr int KEY_PIECES = 3 * KEY_CHANNELS / 8, UNIT_PIECES = UNIT_BYTES / 16;
  constexpr int OWN_PIECES = (UNIT_PIECES + WARPS * 32 - 1) / (WARPS * 32);
  uint4 unit_pieces[OWN_PIECES];
#pragma unroll
  for (int k = 0; k < OWN_PIECES; k++) {
    const int i = min((int)threadIdx.x + k * WARPS * 32, UNIT_PIECES - 1);
    const u16* from = i < KEY_PIECES ? key_units + (i64)bh * 3 * KEY_CHANNELS : value_units + (i64)bh * 3 * WIDTH;
    unit_pieces[k] = reinterpret_cast<const uint4*>(from)[i < KEY_PIECES ? i : i - KEY_PIECES];
  }
#endif
  u8* const slots = shared + SLOTS_AT;
  uint4* const offset_query = reinterpret_cast<uint4*>(slots + WARPS * SLOT);                 // [OFFSET_ROWS][32]
  float* const mapped = reinterpret_cast<float*>(slots + WARPS * SLOT + OFFSET_ROWS * 512);  // [8][MAPPED_ROW]

  // The share of this warp: a run of records, and some units of 16 tokens in full precision, which take about as long as 3 blocks of 32.
  const int records = (length + RECORD_TOKENS - 1) / RECORD_TOKENS;
  const int prefix_units = (prefix_length + 15) / 16, units = prefix_units + (residual_length + 15) / 16;
  const u32 workers = splits * WARPS, worker = split * WARPS + warp;
  constexpr int UNIT_COST = (3 + CHUNKS - 1) / CHUNKS;
  int unit_cost = 0;
#pragma unroll
  for (int k = 1; k <= UNIT_COST; k++) unit_cost += (u32)units <= workers && records >= k * workers;
  // part(n, i) grows with i, by n / workers rounded either way, from 0 to n: `reciprocal` is 2^32 / workers, rounded up, and 0 for one.
  auto part = [&](u32 share, u32 rest, u32 i) { return (int)(i * share + __umulhi(i * rest, reciprocal)); };
  const u32 total = records + unit_cost * units;
  u32 share = reciprocal ? __umulhi(total, reciprocal) : total;  // total / workers, or one more
  share -= share * workers > total;
  const u32 rest = total - share * workers;
  const u32 unit_share = (u32)units < workers ? 0 : units / workers, unit_rest = units - unit_share * workers;
  const int first_unit = part(unit_share, unit_rest, worker), last_unit = part(unit_share, unit_rest, worker + 1);
  const int first = part(share, rest, worker) - unit_cost * first_unit;
  const int count = part(share, rest, worker + 1) - unit_cost * last_unit - first;
  const bool cut = length % RECORD_TOKENS && count > 0 && first + count == records;  // ends in a record that is not full

  u8* const key_slot = slots + warp * SLOT;
  u8* const value_slot = key_slot + RECORDS * KEY_RECORD;
  const u8* const key_run = keys + ((i64)bh * capacity + first) * KEY_RECORD;
  const u8* value_run = values + ((i64)bh * capacity + first) * VALUE_RECORD;
  int value_count = count;
#if PROTECTED
  // The marks of 32 blocks of this warp, and how many protected tokens there are up to its first and its last block.
  const int first_token = first * RECORD_TOKENS, last_token = min(first_token + count * RECORD_TOKENS, length);
  const u32* const marks = chosen.marks + batch * chosen.blocks;
  const int* const before = chosen.before + batch * chosen.blocks;
  auto load_marks = [&](int block) { return marks[min(first * CHUNKS + block + lane, max(last_token - 1, 0) / 32)]; };
  u32 marks_now = 0, marks_next = 0, last_marks = 0;
  int chosen_first = 0, chosen_last = 0;
  if (count > 0) {
    const int last_block = (last_token - 1) / 32;
    marks_now = load_marks(0);
    chosen_first = before[first * CHUNKS];
    chosen_last = before[last_block];
    last_marks = marks[last_block] & ~0u >> 31 - (last_token - 1) % 32;
    marks_next = load_marks(32);
  }
#endif
  Copies copies;
  int key_phase = 0, value_phase = 0;
  copies.init(shared_address(shared) + warp * BARRIERS, lane);
  auto start_keys = [&](int at) {
    copies.start(0, shared_address(key_slot), key_run + (i64)at * KEY_RECORD, min(RECORDS, count - at) * KEY_RECORD, lane);
  };
  auto start_values = [&](int at) {
    const int left = value_count - at, records = left <= VALUE_PLACES ? left : RECORDS;
    copies.start(1, shared_address(value_slot), value_run + (i64)at * VALUE_RECORD, records * VALUE_RECORD, lane);
  };
  start_keys(0);
  if (!PROTECTED) start_values(0);
  if (writes_fresh)
    *reinterpret_cast<uint4*>(piece + (lane < WIDTH / 8
        ? residual.keys + batch * residual.key_batch + head * residual.key_head + fresh_place * residual.key_token
        : residual.values + batch * residual.value_batch + head * residual.value_head + fresh_place * residual.value_token)) = fresh_piece;
  __syncwarp();

  // What is to be mapped: the query of head g as it is, or in half precision and exact but for a power of two. What does not need
  // lengths and order is done while these are under way.
  float shift_own = 1.f;  // what was taken out of head g, a power of two
  u32 inputs[TILES][2];
  auto largest = [&](float value) {
    value = fmaxf(value, __shfl_xor_sync(~0u, value, 1));
    return fmaxf(value, __shfl_xor_sync(~0u, value, 2));
  };
  auto exponent = [](float value, int wanted) { return max(-100, min(100, (int)(__float_as_uint(value) >> 23) - 127 - wanted)); };
#if MAPPED
  {
    float most = 0.f;
#pragma unroll
    for (int j = 0; j < TILES; j++)
#pragma unroll
      for (int kh = 0; kh < 2; kh++) most = fmaxf(most, fmaxf(fabsf(input_low(words[j][kh])), fabsf(input_high(words[j][kh]))));
    const int e = exponent(largest(most), 0);
    shift_own = power(e);
    const float down = power(-e);
#pragma unroll
    for (int j = 0; j < TILES; j++)
#pragma unroll
      for (int kh = 0; kh < 2; kh++) inputs[j][kh] = pack_half(input_low(words[j][kh]) * down, input_high(words[j][kh]) * down);
  }
#else
#pragma unroll
  for (int j = 0; j < TILES; j++)
#pragma unroll
    for (int kh = 0; kh < 2; kh++) inputs[j][kh] = words[j][kh];
#endif
#if ORDERED
  u16* const rows = reinterpret_cast<u16*>(mapped);  // [8][QUERY_ROW]
#pragma unroll
  for (int j = 0; j < TILES; j++)
    if (j % WARPS == warp)
#pragma unroll
      for (int kh = 0; kh < 2; kh++) *reinterpret_cast<u32*>(rows + g * QUERY_ROW + 16 * j + 8 * kh + 2 * t) = inputs[j][kh];
  __syncthreads();
#endif

  // The query of head g in half precision, by a power of two small enough for its products with key scales.
  u32 q[KEY_STEPS][2];
  float centre_own = 0.f;  // query times center
  float x[KEY_STEPS][2][2];
#if CENTERED
#pragma unroll
  for (int j = 0; j < TILES; j++)
#pragma unroll
    for (int kh = 0; kh < 2; kh++) {
      const float2 two = *reinterpret_cast<const float2*>(center + batch * center_batch + head * center_head + 16 * j + 8 * kh + 2 * t);
      centre_own = fmaf(input_low(words[j][kh]), two.x, fmaf(input_high(words[j][kh]), two.y, centre_own));
    }
  centre_own += __shfl_xor_sync(~0u, centre_own, 1);
  centre_own += __shfl_xor_sync(~0u, centre_own, 2);
#endif
  u8* const after_mapped = reinterpret_cast<u8*>(mapped) + MAPPED_BYTES;
  u16* const metadata_units = reinterpret_cast<u16*>(after_mapped + TILES * 256);         // [3][KEY_CHANNELS], [3][WIDTH]
  float* const without_unit = reinterpret_cast<float*>(metadata_units + UNIT_BYTES / 2);  // [8][MAPPED_ROW]
  float* const step_offset_most = without_unit + 8 * MAPPED_ROW;                          // [8][STEP_ROW]
  float* const step_constant = step_offset_most + 8 * STEP_ROW;                           // [8][STEP_ROW]
  float* const offset_worth = step_constant + 8 * STEP_ROW;                               // [8]
#if METADATA_BITS == 4
#pragma unroll
  for (int k = 0; k < OWN_PIECES; k++) {
    const int i = threadIdx.x + k * WARPS * 32;
    if (i < UNIT_PIECES) reinterpret_cast<uint4*>(metadata_units)[i] = unit_pieces[k];
  }
#endif
#if ORDERED
  u32* const ordered = reinterpret_cast<u32*>(after_mapped);  // [TILES][32][2]
#pragma unroll
  for (int i = 0; i < OWN_TILES; i++)
    if (warp + i * WARPS < TILES)
#pragma unroll
      for (int kh = 0; kh < 2; kh++) {
        const u16* row = rows + g * QUERY_ROW;
        ordered[((warp + i * WARPS) * 32 + lane) * 2 + kh] = row[places[i][kh] & 0xffu] | (u32)row[places[i][kh] >> 8] << 16;
      }
#endif
  if (ORDERED || METADATA_BITS == 4) __syncthreads();
#if ORDERED
#pragma unroll
  for (int j = 0; j < TILES; j++) {
    const uint2 two = *reinterpret_cast<const uint2*>(ordered + (j * 32 + lane) * 2);
    inputs[j][0] = two.x;
    inputs[j][1] = two.y;
  }
#endif
#if MAPPED
  {
#pragma unroll
    for (int i = 0; i < OWN_STEPS; i++) {
      const int step = warp + i * WARPS;
      if (step >= KEY_STEPS) break;
      float even[4] = {0.f, 0.f, 0.f, 0.f}, odd[4] = {0.f, 0.f, 0.f, 0.f};
#pragma unroll
      for (int j = 0; j < TILES; j++) {
        const uint4& a = columns[i][j];
        mma(j % 2 ? odd : even, a.x, a.y, a.z, a.w, inputs[j][0], inputs[j][1], j % 2 ? odd : even);
      }
#if METADATA_BITS == 4
      // A code of 4 bits multiplies the query times the unit.
      float most[2] = {0.f, 0.f};  // of heads 2 t and 2 t + 1, times the unit of offsets
#pragma unroll
      for (int k = 0; k < 4; k++) {
        const int channel = 16 * step + 8 * (k >> 1) + g, at = (2 * t + (k & 1)) * MAPPED_ROW + channel;
        const float value = even[k] + odd[k];
        mapped[at] = value * half_low(metadata_units[channel]);
        without_unit[at] = value;
        most[k & 1] = fmaxf(most[k & 1], fabsf(value * half_low(metadata_units[KEY_CHANNELS + channel])));
      }
#pragma unroll
      for (int k = 4; k < 32; k *= 2) {
        most[0] = fmaxf(most[0], __shfl_xor_sync(~0u, most[0], k));
        most[1] = fmaxf(most[1], __shfl_xor_sync(~0u, most[1], k));
      }
      if (g < 2) step_offset_most[(2 * t + g) * STEP_ROW + step] = g ? most[1] : most[0];
#else
#pragma unroll
      for (int k = 0; k < 4; k++) mapped[(2 * t + (k & 1)) * MAPPED_ROW + 16 * step + 8 * (k >> 1) + g] = even[k] + odd[k];
#endif
    }
    __syncthreads();
#pragma unroll
    for (int j = 0; j < KEY_STEPS; j++)
#pragma unroll
      for (int kh = 0; kh < 2; kh++) {
        const float2 two = *reinterpret_cast<const float2*>(mapped + g * MAPPED_ROW + 16 * j + 8 * kh + 2 * t);
        x[j][kh][0] = two.x;
        x[j][kh][1] = two.y;
      }
  }
#else
#pragma unroll
  for (int j = 0; j < KEY_STEPS; j++)
#pragma unroll
    for (int kh = 0; kh < 2; kh++) {
      x[j][kh][0] = input_low(inputs[j][kh]);
      x[j][kh][1] = input_high(inputs[j][kh]);
    }
#endif
  {
    float most = 0.f;
#pragma unroll
    for (int j = 0; j < KEY_STEPS; j++)
#pragma unroll
      for (int kh = 0; kh < 2; kh++) most = fmaxf(most, fmaxf(fabsf(x[j][kh][0]), fabsf(x[j][kh][1])));
    const int e = exponent(largest(most) * fmaxf(1.f, key_bound), 13);
    const float down = power(-e);
#pragma unroll
    for (int j = 0; j < KEY_STEPS; j++)
#pragma unroll
      for (int kh = 0; kh < 2; kh++) {
        x[j][kh][0] *= down;
        x[j][kh][1] *= down;
        const float f = (kh ? 0.25f : 1.f) * (j >= WIDE_STEPS && (j - WIDE_STEPS) % 2 ? 0.5f : 1.f);
        q[j][kh] = pack_half(x[j][kh][0] * f, x[j][kh][1] * f);
      }
#if METADATA_BITS == 4
    // What multiplies codes of scales, for the middle, and of offsets; and what these offsets have in common, at their center.
    float offset_most = 0.f;
#pragma unroll
    for (int j = 0; j < KEY_STEPS; j++) offset_most = fmaxf(offset_most, step_offset_most[g * STEP_ROW + j]);
    const int offset_e = exponent(offset_most, 13);
    if (warp == 0 && t == 0) offset_worth[g] = shift_own * power(offset_e);
#pragma unroll 1
    for (int j = warp; j < KEY_STEPS; j += WARPS) {
      u32 w[2][2];
      float constant = 0.f, sum_of_units = 0.f;
#pragma unroll
      for (int kh = 0; kh < 2; kh++) {
        const int channel = 16 * j + 8 * kh + 2 * t;
        const float2 scaled = *reinterpret_cast<const float2*>(mapped + g * MAPPED_ROW + channel);
        const float2 plain = *reinterpret_cast<const float2*>(without_unit + g * MAPPED_ROW + channel);
        const u32 unit = *reinterpret_cast<const u32*>(metadata_units + KEY_CHANNELS + channel);
        const u32 at = *reinterpret_cast<const u32*>(metadata_units + 2 * KEY_CHANNELS + channel);
        w[0][kh] = pack_half(scaled.x * down * -middle(channel), scaled.y * down * -middle(channel + 1));
        w[1][kh] = pack_half(plain.x * half_low(unit) * power(-offset_e), plain.y * half_high(unit) * power(-offset_e));
        sum_of_units += half_low(w[1][kh]) + half_high(w[1][kh]);
        constant = fmaf(plain.x, half_low(at), fmaf(plain.y, half_high(at), constant));
      }
      offset_query[j * 32 + lane] = make_uint4(w[0][0], w[0][1], w[1][0], w[1][1]);
      constant = fmaf(sum_of_units, -7.f * power(offset_e), constant);  // units as rounded, so that code 7 adds exactly nothing
      constant += __shfl_xor_sync(~0u, constant, 1);
      constant += __shfl_xor_sync(~0u, constant, 2);
      if (t == 0) step_constant[g * STEP_ROW + j] = shift_own * constant;
    }
#else
#pragma unroll
    for (int p = 0; p < OFFSET_PAIRS; p++) {
      if (p % WARPS == warp) {
        u32 w[2][2] = {{0u, 0u}, {0u, 0u}};
#pragma unroll
        for (int i = 0; i < 2; i++) {
          const bool is_stored = p < STORED_PAIRS;
          const int j = is_stored ? 2 * p + i : 2 * (FACTOR_PAIR + p - STORED_PAIRS) + i;
          if (j < (is_stored ? STORED_STEPS : KEY_STEPS)) {
#pragma unroll
            for (int kh = 0; kh < 2; kh++) {
              const int channel = 16 * j + 8 * kh + 2 * t;
              const float f0 = is_stored ? 1.f : -middle(channel), f1 = is_stored ? 1.f : -middle(channel + 1);
              w[i][kh] = pack_half(x[j < KEY_STEPS ? j : 0][kh][0] * f0, x[j < KEY_STEPS ? j : 0][kh][1] * f1);
            }
          }
        }
        offset_query[p * 32 + lane] = make_uint4(w[0][0], w[1][0], w[0][1], w[1][1]);
      }
    }
#endif
    shift_own *= power(e);
  }
  // Scores are computed in units of 2^-24 (rows g) and 2^-20 (rows g + 8), their offsets in units of 1, with scales in 4 bits both smaller
  // by those of the scales; these turn them into exponents of 2, for heads 2 t and 2 t + 1.
  const float shift0 = __shfl_sync(~0u, shift_own, 8 * t), shift1 = __shfl_sync(~0u, shift_own, 8 * t + 4);
  const float one0 = exponent_scale * SCALE_FIELD * shift0, one1 = exponent_scale * SCALE_FIELD * shift1;
  const float low0 = 16777216.f * one0, low1 = 16777216.f * one1, high0 = low0 * 0.0625f, high1 = low1 * 0.0625f;
  float centre0 = CENTERED ? __shfl_sync(~0u, centre_own * exponent_scale, 8 * t) : 0.f;
  float centre1 = CENTERED ? __shfl_sync(~0u, centre_own * exponent_scale, 8 * t + 4) : 0.f;
  // Probabilities are kept large, because half precision has little room below; what they are multiplied with must leave room above.
  float bias = 7.f;
  if (VALUE_SCALE == 2) {
    const int e = (int)(__float_as_uint(value_bound) >> 23) - 126;
    bias -= value_bound > 1.f ? (float)e : 0.f;
  }
  const u32 half_limit = (u32)((int)(bias + GROWTH) + 15) << 10;  // the running maximum is raised when it would grow by more than 2^GROWTH
  if (OFFSET_ROWS > 0) __syncthreads();
  float stored0 = 0.f, stored1 = 0.f;  // what stored offsets in 4 bits are worth
  if (METADATA_BITS == 4) {
    stored0 = exponent_scale * 16777216.f * offset_worth[2 * t];
    stored1 = exponent_scale * 16777216.f * offset_worth[2 * t + 1];
#pragma unroll
    for (int j = 0; j < STORED_STEPS; j++) {
      centre0 = fmaf(exponent_scale, step_constant[2 * t * STEP_ROW + j], centre0);
      centre1 = fmaf(exponent_scale, step_constant[(2 * t + 1) * STEP_ROW + j], centre1);
    }
  }
  // Value channels of this lane, rows g and g + 8 of a tile: 0 unit of scales, 1 unit and 2 center of offsets.
  auto value_unit_of = [&](int which, int m) {
    return *reinterpret_cast<const u32*>(metadata_units + 3 * KEY_CHANNELS + which * WIDTH + (g * TILES + m) * 2);
  };

#if PROTECTED
  // Entries of both runs that belong to the tokens of this warp. Queues begin where the records of the first ones do.
  chosen_last += __popc(last_marks);
  const int other_first = first_token - chosen_first, other_last = last_token - chosen_last;
  auto records_up_to = [](int entries) { return (entries + RECORD_TOKENS - 1) / RECORD_TOKENS; };
  const int chosen_count = chosen_last > chosen_first ? records_up_to(chosen_last) - chosen_first / RECORD_TOKENS : 0;
  value_count = other_last > other_first ? records_up_to(other_last) - other_first / RECORD_TOKENS : 0;
  int chosen_filled = chosen_count > 0 ? chosen_first % RECORD_TOKENS : 0, chosen_used = 0;
  int other_filled = value_count > 0 ? other_first % RECORD_TOKENS : 0, other_used = 0;
  const u8* const chosen_run = chosen.values + ((i64)bh * chosen.capacity + chosen_first / RECORD_TOKENS) * CHOSEN_RECORD;
  value_run = values + ((i64)bh * capacity + other_first / RECORD_TOKENS) * VALUE_RECORD;
  u8* const chosen_slot = key_slot + CHOSEN_AT;
  const u32 queues = shared_address(key_slot) + QUEUES_AT;
  int chosen_phase = 0, chosen_loaded = 0, other_loaded = 0;  // first entries in the slots
  auto start_chosen = [&](int at) {
    const u8* const from = chosen_run + (i64)at * CHOSEN_RECORD;
    copies.start(2, shared_address(chosen_slot), from, min(CHOSEN_RECORDS, chosen_count - at) * CHOSEN_RECORD, lane);
  };
  start_values(0);
  start_chosen(0);
  // Sets the probabilities of entries `from` up to `to` to 0, in the queue that begins at row `queue`.
  auto clear = [&](int queue, int from, int to) {
    for (int entry = from + lane; entry < to; entry += 32)
      asm volatile("st.shared.v4.u32 [%0], {%1, %1, %1, %1};" ::"r"(queues + (queue + (entry & (QUEUE - 1))) * 16), "r"(0) : "memory");
  };
  clear(0, 0, other_filled);
  clear(QUEUE, 0, chosen_filled);
#endif

  float acc[TILES][4];
#pragma unroll
  for (int m = 0; m < TILES; m++) acc[m][0] = acc[m][1] = acc[m][2] = acc[m][3] = 0.f;
  float base[VALUE_STORED && VALUE_SCALE == 1 ? TILES : 4][4];  // stored offsets of values times probabilities; see the end for rows
#pragma unroll
  for (int m = 0; m < (int)(sizeof(base) / 16); m++) base[m][0] = base[m][1] = base[m][2] = base[m][3] = 0.f;
  float top0 = LOWEST, top1 = LOWEST;              // running maximum, exponents of 2
  float full0 = 0.f, full1 = 0.f;                  // sum of probabilities of tokens in full precision
  float sum[4] = {0.f, 0.f, 0.f, 0.f};             // and of history, twice

  // Raises the running maximum to x of all rows.
  auto raise = [&](float x0, float x1) {
#pragma unroll
    for (int k = 4; k < 32; k *= 2) {
      x0 = fmaxf(x0, __shfl_xor_sync(~0u, x0, k));
      x1 = fmaxf(x1, __shfl_xor_sync(~0u, x1, k));
    }
    x0 = fmaxf(x0, top0);
    x1 = fmaxf(x1, top1);
    const float a0 = exp2_fast(top0 - x0), a1 = exp2_fast(top1 - x1);
    top0 = x0;
    top1 = x1;
    full0 *= a0;
    full1 *= a1;
#pragma unroll
    for (int k = 0; k < 4; k++) sum[k] *= k & 1 ? a1 : a0;
#pragma unroll
    for (int m = 0; m < TILES; m++)
#pragma unroll
      for (int k = 0; k < 4; k++) acc[m][k] *= k & 1 ? a1 : a0;
    if (VALUE_STORED || VALUE_SCALE == 2) {
#pragma unroll
      for (int m = 0; m < (int)(sizeof(base) / 16); m++)
#pragma unroll
        for (int k = 0; k < 4; k++) base[m][k] *= k & 1 ? a1 : a0;
    }
  };

#if PROTECTED
  // Probabilities that wait, after the running maximum was raised.
  auto rescale_queues = [&](float a0, float a1) {
    __syncwarp();
#pragma unroll 4
    for (u32 at = queues + g * 16 + t * 4; at < queues + 2 * QUEUE * 16; at += 128) {
      u32 two;
      asm volatile("ld.shared.u32 %0, [%1];" : "=r"(two) : "r"(at) : "memory");
      asm volatile("st.shared.u32 [%0], %1;" ::"r"(at), "r"(pack_half(half_low(two) * a0, half_high(two) * a1)) : "memory");
    }
    __syncwarp();
  };
  // Adds the values of a record of protected tokens, in the units of the others.
  auto add_chosen = [&](const u8* record, const u32 (&b)[CHUNKS][2][2]) __attribute__((always_inline)) {
    float own[4] = {0.f, 0.f, 0.f, 0.f};
    float d[TILES][4];
#pragma unroll
    for (int m = 0; m < TILES; m++) d[m][0] = d[m][1] = d[m][2] = d[m][3] = 0.f;
#pragma unroll
    for (int c = 0; c < CHUNKS; c++) {
      mma(own, HALF_1, HALF_1, HALF_4, HALF_4, b[c][0][0], b[c][0][1], own);
      mma(own, HALF_1, HALF_1, HALF_4, HALF_4, b[c][1][0], b[c][1][1], own);
      u32 words[TILES];
      load_words<TILES>(words, record + c * TILES * 128, lane);
#pragma unroll
      for (int m = 0; m < TILES; m++) {
        const Fields<2> a(words[m], 0), a8(words[m] >> 8, 0);
        mma(d[m], a.a0, a.a1, a.a2, a.a3, b[c][0][0], b[c][0][1], d[m]);
        mma(d[m], a8.a0, a8.a1, a8.a2, a8.a3, b[c][1][0], b[c][1][1], d[m]);
      }
    }
    full0 += own[0];
    full1 += own[1];
#pragma unroll
    for (int m = 0; m < TILES; m++) {
      const u32 scale = *reinterpret_cast<const u32*>(record + CHUNKS * TILES * 128 + (g * TILES + m) * 4);
      const u32 minimum = *reinterpret_cast<const u32*>(record + CHOSEN_OFFSET_AT + (g * TILES + m) * 4);
#pragma unroll
      for (int k = 0; k < 4; k++) {
        const float unit = CODE_UNIT * (k & 2 ? 16.f : 1.f), twice = VALUE_BITS == 1 && m & 1 ? 2.f : 1.f;
        const float f = (k & 2 ? half_high(scale) : half_low(scale)) * twice, h = (k & 2 ? half_high(minimum) : half_low(minimum)) * twice;
        acc[m][k] = fmaf(f, d[m][k], fmaf(h, own[k & 1] * unit, acc[m][k]));
      }
    }
  };
#endif

  // A unit of tokens in full precision, straight from memory: a lane takes 8 channels, in each 32, of rows g and g + 8.
  uint4 kr[2][WIDTH / 32], vr[2][WIDTH / 32];
  auto load_unit = [&](int unit) {
    const bool is_prefix = unit < prefix_units;
    const int at = (is_prefix ? unit : unit - prefix_units) * 16, left = (is_prefix ? prefix_length : residual_length) - at;
    const i64 key_token = is_prefix ? prefix.key_token : residual.key_token;
    const i64 value_token = is_prefix ? prefix.value_token : residual.value_token;
    const u16* const k = is_prefix ? prefix.keys + batch * prefix.key_batch + head * prefix.key_head
        : residual.keys + batch * residual.key_batch + head * residual.key_head;
    const u16* const v = is_prefix ? prefix.values + batch * prefix.value_batch + head * prefix.value_head
        : residual.values + batch * residual.value_batch + head * residual.value_head;
#pragma unroll
    for (int rr = 0; rr < 2; rr++) {
      const int row = g + 8 * rr;
      const bool is_fresh = fresh.keys && !is_prefix && at + row == fresh_place;
      const u16* const row_k = is_fresh ? fresh.keys + batch * fresh.key_batch + head * fresh.key_head : k + (at + row) * key_token;
      const u16* const row_v = is_fresh ? fresh.values + batch * fresh.value_batch + head * fresh.value_head : v + (at + row) * value_token;
#pragma unroll
      for (int j = 0; j < WIDTH / 32; j++) {
        kr[rr][j] = vr[rr][j] = make_uint4(0, 0, 0, 0);
        if (row < left) {
          kr[rr][j] = *reinterpret_cast<const uint4*>(row_k + 8 * t + 32 * j);
          vr[rr][j] = *reinterpret_cast<const uint4*>(row_v + 8 * t + 32 * j);
        }
      }
    }
  };

  // Tokens in full precision, 16 at a time. Channel order does not matter to scores; in the output it is `channel_of`, which is why
  // values are packed in that order.
  if (first_unit < last_unit) {
    uint4 raw[WIDTH / 32];
#pragma unroll
    for (int j = 0; j < WIDTH / 32; j++) {
      raw[j] = make_uint4(0, 0, 0, 0);
      if (g < head_count) raw[j] = *reinterpret_cast<const uint4*>(query + (query_row + g) * WIDTH + 32 * j + 8 * t);
    }
#pragma unroll 1
    for (int unit = first_unit; unit < last_unit; unit++) {
      load_unit(unit);
      const int left = unit < prefix_units ? prefix_length - unit * 16 : residual_length - (unit - prefix_units) * 16;
      float s[4] = {0.f, 0.f, 0.f, 0.f};
#pragma unroll
      for (int j = 0; j < WIDTH / 32; j++) {
        mma_input(s, kr[0][j].x, kr[1][j].x, kr[0][j].y, kr[1][j].y, raw[j].x, raw[j].y);
        mma_input(s, kr[0][j].z, kr[1][j].z, kr[0][j].w, kr[1][j].w, raw[j].z, raw[j].w);
      }
#pragma unroll
      for (int k = 0; k < 4; k++) s[k] = g + 8 * (k >> 1) < left ? s[k] * exponent_scale : NEVER;
      const float x0 = fmaxf(s[0], s[2]), x1 = fmaxf(s[1], s[3]);
      if (__any_sync(~0u, x0 > top0 + GROWTH || x1 > top1 + GROWTH)) raise(x0, x1);
#pragma unroll
      for (int k = 0; k < 4; k++) s[k] = exp2_fast(s[k] - (k & 1 ? top1 : top0) + bias);
      u32 b0 = pack_input(s[0], s[1]), b1 = pack_input(s[2], s[3]);
#if BRAIN  // probabilities in two terms: bfloat16 alone has 8 bits
      const u32 c0 = transpose(pack_input(s[0] - input_low(b0), s[1] - input_high(b0)));
      const u32 c1 = transpose(pack_input(s[2] - input_low(b1), s[3] - input_high(b1)));
#endif
      b0 = transpose(b0);
      b1 = transpose(b1);
      float ones[4] = {0.f, 0.f, 0.f, 0.f};
      mma_input(ones, INPUT_ONES, INPUT_ONES, INPUT_ONES, INPUT_ONES, b0, b1);
#if BRAIN
      mma_input(ones, INPUT_ONES, INPUT_ONES, INPUT_ONES, INPUT_ONES, c0, c1);
#endif
      full0 += ones[0];
      full1 += ones[1];
#pragma unroll
      for (int m = 0; m < TILES; m++) {
        const uint4 &v0 = vr[0][m >> 1], &v1 = vr[1][m >> 1];
        const u32 a0 = transpose(m & 1 ? v0.z : v0.x), a1 = transpose(m & 1 ? v0.w : v0.y);
        const u32 a2 = transpose(m & 1 ? v1.z : v1.x), a3 = transpose(m & 1 ? v1.w : v1.y);
        mma_input(acc[m], a0, a1, a2, a3, b0, b1);
#if BRAIN
        mma_input(acc[m], a0, a1, a2, a3, c0, c1);
#endif
      }
    }
#pragma unroll
    for (int m = 0; m < TILES; m++)
#pragma unroll
      for (int k = 0; k < 4; k++) acc[m][k] *= CODE_UNIT * (k & 2 ? 16.f : 1.f) * (VALUE_BITS == 1 && m & 1 ? 2.f : 1.f);
    if constexpr (METADATA_BITS == 4 && VALUE_SCALE == 1) {
#pragma unroll
      for (int m = 0; m < TILES; m++) {
        const u32 unit = value_unit_of(0, m);
        const float f = 1.f / (SCALE_FIELD * half_low(unit)), h = 1.f / (SCALE_FIELD * half_high(unit));
#pragma unroll
        for (int k = 0; k < 4; k++) acc[m][k] *= k & 2 ? h : f;
      }
    }
  }

  // One step over `size` records that lie in the slots, from the one at `from` on. In the tail they have arrived, and nothing comes after.
  // `use` gets its probabilities record by record, half precision, times a power of two: rows are tokens, columns heads.
  auto step = [&](auto size, auto is_tail, int at, int from, auto use) __attribute__((always_inline)) {
    constexpr int N = decltype(size)::value;
    constexpr bool tail = decltype(is_tail)::value;
    constexpr int SUMS = N * CHUNKS <= 2 ? 2 : 1;
    if constexpr (!tail) copies.wait(0, key_phase);
    float offset0 = 0.f, offset1 = 0.f;  // of scores, the same for all tokens of record g
    if constexpr (METADATA_BITS == 4) {
      // Rows g are scales, rows g + 8 offsets, of record g; one product is for each, and half of either is ignored.
      float scales[4] = {0.f, 0.f, 0.f, 0.f}, offsets[4] = {0.f, 0.f, 0.f, 0.f};
      u32 metadata[KEY_STEPS];
      load_words<KEY_STEPS, 4>(metadata, key_slot + (from + (g < N ? g : N - 1)) * KEY_RECORD + KEY_SCALE_AT, t);
#pragma unroll
      for (int j = 0; j < KEY_STEPS; j++) {
        const u32 word = metadata[j], word8 = word >> 8;
        const u32 a0 = word & SCALE_MASK, a1 = word & OFFSET_MASK, a2 = word8 & SCALE_MASK, a3 = word8 & OFFSET_MASK;
        const uint4 b = offset_query[j * 32 + lane];
        mma(scales, a0, a1, a2, a3, b.x, b.y, scales);
        if (j < STORED_STEPS) mma(offsets, a0, a1, a2, a3, b.z, b.w, offsets);
      }
      offset0 = fmaf(scales[0], one0, fmaf(offsets[2], stored0, centre0));
      offset1 = fmaf(scales[1], one1, fmaf(offsets[3], stored1, centre1));
    } else if constexpr (OFFSET_PAIRS > 0) {
      // Rows are records. Registers 0 and 2 of a quad belong to rows g, 1 and 3 to rows g + 8; the halves that do not match are ignored.
      float even[4] = {0.f, 0.f, 0.f, 0.f}, odd[4] = {0.f, 0.f, 0.f, 0.f};
      const u8* record = key_slot + (from + (g < N ? g : N - 1)) * KEY_RECORD;
#pragma unroll
      for (int p = 0; p < OFFSET_PAIRS; p++) {
        uint4 a;
        if (p >= STORED_PAIRS) {
          a = *reinterpret_cast<const uint4*>(record + KEY_SCALE_AT + (FACTOR_PAIR + p - STORED_PAIRS) * 64 + t * 16);
        } else if (2 * p + 1 < STORED_STEPS) {
          a = *reinterpret_cast<const uint4*>(record + KEY_OFFSET_AT + p * 64 + t * 16);
        } else {
          const uint2 two = *reinterpret_cast<const uint2*>(record + KEY_OFFSET_AT + p * 64 + t * 8);
          a = make_uint4(two.x, two.y, 0, 0);
        }
        const uint4 b = offset_query[p * 32 + lane];
        mma(even, a.x, a.y, a.z, a.w, b.x, b.y, even);
        mma(odd, a.x, a.y, a.z, a.w, b.z, b.w, odd);
      }
      offset0 = fmaf(even[0] + odd[2], one0, centre0);
      offset1 = fmaf(even[1] + odd[3], one1, centre1);
    } else {
      offset0 = centre0;
      offset1 = centre1;
    }
    float s[N * CHUNKS][2][4];
#pragma unroll
    for (int i = 0; i < N; i++) {
      const u8* record = key_slot + (from + i) * KEY_RECORD;
      u32 b[KEY_STEPS + 1][2];
#if METADATA_BITS == 4
      u32 metadata[KEY_STEPS];
      load_words<KEY_STEPS, 4>(metadata, record + KEY_SCALE_AT, t);
#pragma unroll
      for (int j = 0; j < KEY_STEPS; j++) {
        b[j][0] = multiply(q[j][0], metadata[j] & SCALE_MASK);
        b[j][1] = multiply(q[j][1], metadata[j] >> 8 & SCALE_MASK);
      }
#else
#pragma unroll
      for (int p = 0; p < KEY_PAIRS; p++) {
        const uint4 scale = *reinterpret_cast<const uint4*>(record + KEY_SCALE_AT + p * 64 + t * 16);
        b[2 * p][0] = multiply(q[2 * p][0], scale.x);
        b[2 * p][1] = multiply(q[2 * p][1], scale.y);
        if (2 * p + 1 < KEY_STEPS) {
          b[2 * p + 1][0] = multiply(q[2 * p + 1 < KEY_STEPS ? 2 * p + 1 : 0][0], scale.z);
          b[2 * p + 1][1] = multiply(q[2 * p + 1 < KEY_STEPS ? 2 * p + 1 : 0][1], scale.w);
        }
      }
#endif
#pragma unroll
      for (int c = 0; c < CHUNKS; c++) {
        // Two sums, where there are too few tokens to keep the matrix units busy with one.
        float sums[2][2][4];
#pragma unroll
        for (int k = 0; k < 16; k++) sums[k >> 3][k >> 2 & 1][k & 3] = 0.f;
        const u8* codes = record + c * KEY_CODES;
        if constexpr (WIDE_STEPS > 0) {
          u32 words[WIDE_STEPS > 0 ? WIDE_STEPS : 1];
          load_words<WIDE_STEPS>(words, codes, lane);
#pragma unroll
          for (int j = 0; j < WIDE_STEPS; j++)
#pragma unroll
            for (int token_tile = 0; token_tile < 2; token_tile++) {
              const Fields<2> a(token_tile ? words[j] >> 8 : words[j], 0);
              mma(sums[j % SUMS][token_tile], a.a0, a.a1, a.a2, a.a3, b[j][0], b[j][1], sums[j % SUMS][token_tile]);
            }
        }
        if constexpr (NARROW_STEPS > 0) {
          constexpr int pairs = NARROW_STEPS / 2;
          u32 words[pairs + 1];
          const u8* narrow = codes + WIDE_STEPS * 128;
          if constexpr (pairs > 0) {
            u32 whole[pairs > 0 ? pairs : 1];
            load_words<pairs>(whole, narrow, lane);
#pragma unroll
            for (int j = 0; j < pairs; j++) words[j] = whole[j];
          }
          if constexpr (NARROW_STEPS % 2)
            words[pairs] = __byte_perm(*reinterpret_cast<const u16*>(narrow + pairs * 128 + lane * 2), 0, 0x4140);
#pragma unroll
          for (int j = 0; j < NARROW_STEPS; j++)
#pragma unroll
            for (int token_tile = 0; token_tile < 2; token_tile++) {
              // The last k-step of an odd number has one byte in each half, and its token tiles have even and odd bits.
              const int shift = NARROW_STEPS % 2 && j == NARROW_STEPS - 1 ? 1 : 8;
              const Fields<1> a(token_tile ? words[j / 2] >> shift : words[j / 2], j % 2);
              float(&sum_of)[4] = sums[(WIDE_STEPS + j) % SUMS][token_tile];
              mma(sum_of, a.a0, a.a1, a.a2, a.a3, b[WIDE_STEPS + j][0], b[WIDE_STEPS + j][1], sum_of);
            }
        }
#pragma unroll
        for (int k = 0; k < 8; k++) {
          const float one = sums[0][k >> 2][k & 3];
          s[i * CHUNKS + c][k >> 2][k & 3] = SUMS == 2 ? one + sums[1][k >> 2][k & 3] : one;
        }
      }
    }
    if constexpr (tail && N == 1) {
      if (cut && at == count - 1) {
#pragma unroll
        for (int c = 0; c < CHUNKS; c++)
#pragma unroll
          for (int k = 0; k < 8; k++) {
            const int token = (first + at) * RECORD_TOKENS + 32 * c + 16 * (k >> 2) + 8 * (k >> 1 & 1) + g;
            if (token >= length) s[c][k >> 2][k & 3] = NEVER;
          }
      }
    }
    if constexpr (!tail) {
      __syncwarp();
      start_keys(at + N);
      key_phase ^= 1;
    }

    float o[N][2];
#pragma unroll
    for (int i = 0; i < N; i++) {
      o[i][0] = OFFSET_ROWS > 0 ? __shfl_sync(~0u, offset0, i * 4 + t) : offset0;
      o[i][1] = OFFSET_ROWS > 0 ? __shfl_sync(~0u, offset1, i * 4 + t) : offset1;
    }
    auto raise_to_these = [&](bool is_needed_anyway) {
      float x0 = NEVER, x1 = NEVER;
#pragma unroll
      for (int i = 0; i < N; i++) {
        float top[4] = {NEVER, NEVER, NEVER, NEVER};
#pragma unroll
        for (int c = 0; c < CHUNKS; c++)
#pragma unroll
          for (int k = 0; k < 8; k++) top[k & 3] = fmaxf(top[k & 3], s[i * CHUNKS + c][k >> 2][k & 3]);
        x0 = fmaxf(x0, fmaf(fmaxf(top[0], top[2] * 0.0625f), low0, o[i][0]));
        x1 = fmaxf(x1, fmaf(fmaxf(top[1], top[3] * 0.0625f), low1, o[i][1]));
      }
      if (is_needed_anyway || __any_sync(~0u, x0 > top0 + GROWTH || x1 > top1 + GROWTH)) {
#if PROTECTED
        const float was0 = top0, was1 = top1;
        raise(x0, x1);
        if (at > 0) rescale_queues(exp2_fast(was0 - top0), exp2_fast(was1 - top1));
#else
        raise(x0, x1);
#endif
      }
    };
    u32 probabilities[N * CHUNKS][2][2];
    auto weigh = [&](int i) {
      // Rows g + 8 of scores are columns 8 and up of probabilities, whose fields are worth 4 times as much, unless queues reorder them.
      constexpr float high_minus = PROTECTED ? 0.f : 2.f;
      const float minus0 = o[i][0] + (bias - top0), minus1 = o[i][1] + (bias - top1);
      u32 largest_half = 0;
#pragma unroll
      for (int c = 0; c < CHUNKS; c++)
#pragma unroll
        for (int ks = 0; ks < 2; ks++) {
          const float(&sc)[4] = s[i * CHUNKS + c][ks];
          u32(&p)[2] = probabilities[i * CHUNKS + c][ks];
          p[0] = pack_half(exp2_fast(fmaf(sc[0], low0, minus0)), exp2_fast(fmaf(sc[1], low1, minus1)));
          p[1] = pack_half(exp2_fast(fmaf(sc[2], high0, minus0 - high_minus)), exp2_fast(fmaf(sc[3], high1, minus1 - high_minus)));
          largest_half = larger(largest_half, larger(p[0], p[1]));
        }
      return largest_half;
    };
    // With few tokens, probabilities are made as if the running maximum were still right, and again if they come out too large: that
    // is faster than to find the maximum first. With many, it is slower, and they are made one record at a time, below.
    constexpr bool guesses = N * CHUNKS <= 2;
    if constexpr (guesses) {
#pragma unroll 1
      for (bool is_raised = false;; is_raised = true) {
        u32 largest_half = 0;
#pragma unroll
        for (int i = 0; i < N; i++) largest_half = larger(largest_half, weigh(i));
        if (is_raised || !__any_sync(~0u, (largest_half & 0xffffu) > half_limit || (largest_half >> 16) > half_limit)) break;
        raise_to_these(true);
      }
    } else {
      raise_to_these(false);
    }
    use(size, is_tail, at, from, [&](int i, int c, int ks, int rr) {
      if (!guesses && c + ks + rr == 0) weigh(i);
      return probabilities[i * CHUNKS + c][ks][rr];
    });
  };

  // Adds values of records that lie in the slot, from the one at `from` on, given their probabilities as operands of the matrix units.
  auto add_values = [&](auto size, int from, auto operand) __attribute__((always_inline)) {
#pragma unroll
    for (int i = 0; i < decltype(size)::value; i++) {
      const u8* record = value_slot + (from + i) * VALUE_RECORD;
      u32 b[CHUNKS][2][2];
      operand(i, b);
      float own[4] = {0.f, 0.f, 0.f, 0.f};  // sum of the probabilities of this record, on every lane
#pragma unroll
      for (int c = 0; c < CHUNKS; c++)
#pragma unroll
        for (int ks = 0; ks < 2; ks++) {
          if constexpr (VALUE_SCALE == 1) mma(own, HALF_1, HALF_1, HALF_4, HALF_4, b[c][ks][0], b[c][ks][1], own);
          else mma(sum, HALF_1, HALF_1, HALF_4, HALF_4, b[c][ks][0], b[c][ks][1], sum);
        }
      if constexpr (VALUE_SCALE == 1) {
        sum[0] += own[0];
        sum[1] += own[1];
        u32 scale[TILES];
        u32 metadata[TILES / 2];  // of 4 bits, two tiles a word
        if constexpr (METADATA_BITS == 4) {
          load_words<TILES / 2, 8>(metadata, record + VALUE_SCALE_AT, g);
#pragma unroll
          for (int m = 0; m < TILES; m++) scale[m] = metadata[m / 2] >> 8 * (m & 1) & SCALE_MASK;
        } else {
#pragma unroll
          for (int m = 0; m < TILES; m += 4)
            *reinterpret_cast<uint4*>(scale + m) = *reinterpret_cast<const uint4*>(record + VALUE_SCALE_AT + g * TILES * 4 + m * 4);
        }
        constexpr float centre = -0.5f * VALUE_CENTRE * CODE_UNIT;
        const float start[4] = {own[0] * centre, own[1] * centre, own[0] * (16.f * centre), own[1] * (16.f * centre)};
        float d[TILES][4];
#pragma unroll
        for (int c = 0; c < CHUNKS; c++) {
          u32 words[VALUE_WORDS];
          load_words<VALUE_WORDS>(words, record + c * VALUE_CODES, lane);
#pragma unroll
          for (int m = 0; m < TILES; m++) {
            const int parity = VALUE_BITS == 1 ? m & 1 : 0;
            const u32 word = words[VALUE_BITS == 1 ? m / 2 : m];
            if (c == 0) {
#pragma unroll
              for (int k = 0; k < 4; k++) d[m][k] = VALUE_CENTRE ? (parity ? 2.f * start[k] : start[k]) : 0.f;
            }
            const Fields<VALUE_BITS> a(word, parity), a8(word >> 8, parity);
            mma(d[m], a.a0, a.a1, a.a2, a.a3, b[c][0][0], b[c][0][1], d[m]);
            mma(d[m], a8.a0, a8.a1, a8.a2, a8.a3, b[c][1][0], b[c][1][1], d[m]);
            if (c == CHUNKS - 1) {
              const float f = half_low(scale[m]), h = half_high(scale[m]);
              acc[m][0] = fmaf(f, d[m][0], acc[m][0]);
              acc[m][1] = fmaf(f, d[m][1], acc[m][1]);
              acc[m][2] = fmaf(h, d[m][2], acc[m][2]);
              acc[m][3] = fmaf(h, d[m][3], acc[m][3]);
            }
          }
        }
        if constexpr (VALUE_STORED) {
          // The sum of probabilities, in two terms, in column 0 and 2; each product gives a row half of two channel tiles.
          const float p0 = own[0] * 0.0078125f, p1 = own[1] * 0.0078125f;
          const u32 coarse = pack_half(p0, p1), fine = pack_half(p0 - half_low(coarse), p1 - half_high(coarse));
          const u32 coarse_t = transpose(coarse), fine_t = transpose(fine);
          const u32 two = t == 0 ? coarse_t : t == 1 ? fine_t : 0u;
          const u32 low = two & 0xffffu, high = two & 0xffff0000u;
#pragma unroll
          for (int m = 0; m < TILES; m += 4) {
            uint4 a;
            if constexpr (METADATA_BITS == 4) {
              const u32 one = metadata[m / 2], two_more = metadata[m / 2 + 1];
              a = make_uint4(one & OFFSET_MASK, one >> 8 & OFFSET_MASK, two_more & OFFSET_MASK, two_more >> 8 & OFFSET_MASK);
            } else {
              a = *reinterpret_cast<const uint4*>(record + VALUE_OFFSET_AT + g * TILES * 4 + m * 4);
            }
            mma(base[m], a.x, a.y, a.z, a.w, low, 0u, base[m]);
            mma(base[m + 1], a.x, a.y, a.z, a.w, high, 0u, base[m + 1]);
            mma(base[m + 2], a.x, a.y, a.z, a.w, 0u, low, base[m + 2]);
            mma(base[m + 3], a.x, a.y, a.z, a.w, 0u, high, base[m + 3]);
          }
        }
      } else {
#pragma unroll
        for (int c = 0; c < CHUNKS; c++) {
          u32 words[VALUE_WORDS];
          load_words<VALUE_WORDS>(words, record + c * VALUE_CODES, lane);
          if constexpr (VALUE_SCALE == 2) {
            // Rows are groups of channels; as for keys, the halves of a quad that do not match are ignored.
            const u8* mine = record + c * WIDTH * 2 + ((g & (TOKEN_GROUPS - 1)) * 4 + t) * 16;
            if constexpr (VALUE_STORED) {
              const uint4 a = *reinterpret_cast<const uint4*>(mine + VALUE_OFFSET_AT);
              mma(base[0], a.x, a.y, a.z, a.w, b[c][0][0], b[c][1][0], base[0]);
              mma(base[1], a.x, a.y, a.z, a.w, b[c][0][1], b[c][1][1], base[1]);
            }
            if constexpr (VALUE_CENTRE) {
              const uint4 a = *reinterpret_cast<const uint4*>(mine + VALUE_SCALE_AT);
              mma(base[2], a.x, a.y, a.z, a.w, b[c][0][0], b[c][1][0], base[2]);
              mma(base[3], a.x, a.y, a.z, a.w, b[c][0][1], b[c][1][1], base[3]);
            }
          }
          uint4 scale;
#pragma unroll
          for (int m = 0; m < TILES; m++) {
            const int parity = VALUE_BITS == 1 ? m & 1 : 0;
            const u32 word = words[VALUE_BITS == 1 ? m / 2 : m];
            u32 p[2][2] = {{b[c][0][0], b[c][0][1]}, {b[c][1][0], b[c][1][1]}};
            if constexpr (VALUE_SCALE == 2) {
              if (m % 2 == 0) scale = *reinterpret_cast<const uint4*>(record + VALUE_SCALE_AT + c * WIDTH * 2 + ((m / 2) * 4 + t) * 16);
              p[0][0] = multiply(p[0][0], scale.x);
              p[0][1] = multiply(p[0][1], scale.y);
              p[1][0] = multiply(p[1][0], scale.z);
              p[1][1] = multiply(p[1][1], scale.w);
            }
            const Fields<VALUE_BITS> a(word, parity), a8(word >> 8, parity);
            mma(acc[m], a.a0, a.a1, a.a2, a.a3, p[0][0], p[0][1], acc[m]);
            mma(acc[m], a8.a0, a8.a1, a8.a2, a8.a3, p[1][0], p[1][1], acc[m]);
          }
        }
      }
    }
  };
  const int whole = cut ? count - 1 : count;
  // What is left, less than a whole step or ending in a record that is not full; its copies have arrived.
  auto step_through_rest = [&](int at, auto use) __attribute__((always_inline)) {
    int from = 0;
    if constexpr (RECORDS > 4) {
      if (at + 4 <= whole) {
        step(Number<4>{}, Number<1>{}, at, from, use);
        at += 4;
        from += 4;
      }
    }
    if constexpr (RECORDS > 2) {
      if (at + 2 <= whole) {
        step(Number<2>{}, Number<1>{}, at, from, use);
        at += 2;
        from += 2;
      }
    }
#pragma unroll 1
    for (; at < count; at++, from++) step(Number<1>{}, Number<1>{}, at, from, use);
  };
  int at = 0;
#if PROTECTED
  // Sorts the probabilities of a step into the queues: lane i finds the row of token i of a block.
  auto enqueue = [&](auto size, auto is_tail, int at, int, auto probability) __attribute__((always_inline)) {
    constexpr int N = decltype(size)::value;
#pragma unroll
    for (int i = 0; i < N; i++)
#pragma unroll
      for (int c = 0; c < CHUNKS; c++) {
        u32 held = ~0u;
        if constexpr (decltype(is_tail)::value && N == 1) {
          const int left = last_token - first_token - at * RECORD_TOKENS - 32 * c;
          held = left >= 32 ? ~0u : left > 0 ? (1u << left) - 1 : 0u;
        }
        const u32 protected_ones = __shfl_sync(~0u, marks_now, ((at + i) * CHUNKS + c) & 31) & held;
        const int rank = __popc(protected_ones & ((1u << lane) - 1));
        int row = (other_filled + lane - rank) & (QUEUE - 1);
        if (protected_ones >> lane & 1) row = QUEUE + ((chosen_filled + rank) & (QUEUE - 1));
        if (!(held >> lane & 1)) row = 2 * QUEUE;
        chosen_filled += __popc(protected_ones);
        other_filled += __popc(held & ~protected_ones);
#pragma unroll
        for (int ks = 0; ks < 2; ks++)
#pragma unroll
          for (int rr = 0; rr < 2; rr++) {
            const u32 to = queues + __shfl_sync(~0u, row, 16 * ks + 8 * rr + g) * 16 + t * 4;
            asm volatile("st.shared.u32 [%0], %1;" ::"r"(to), "r"(probability(i, c, ks, rr)) : "memory");
          }
      }
  };
  // Probabilities of the record of an entry, from the queue that begins at row `queue`, as operands.
  auto read_queue = [&](int queue, int entry, u32 (&b)[CHUNKS][2][2]) {
#pragma unroll
    for (int c = 0; c < CHUNKS; c++) {
      asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                   : "=r"(b[c][0][0]), "=r"(b[c][0][1]), "=r"(b[c][1][0]), "=r"(b[c][1][1])
                   : "r"(queues + (queue + (entry & (QUEUE - 1)) + 32 * c + lane) * 16) : "memory");
      b[c][0][1] = multiply(b[c][0][1], HALF_QUARTER);
      b[c][1][1] = multiply(b[c][1][1], HALF_QUARTER);
    }
  };
  auto use_others = [&](auto size) __attribute__((always_inline)) {
    copies.wait(1, value_phase);
    add_values(size, (other_used - other_loaded) / RECORD_TOKENS, [&](int i, u32 (&b)[CHUNKS][2][2]) {
      read_queue(0, other_used + i * RECORD_TOKENS, b);
    });
    other_used += decltype(size)::value * RECORD_TOKENS;
  };
  auto use_chosen = [&](auto size) __attribute__((always_inline)) {
    constexpr int N = decltype(size)::value;
    copies.wait(2, chosen_phase);
    u32 b[N][CHUNKS][2][2];
#pragma unroll
    for (int i = 0; i < N; i++) read_queue(QUEUE, chosen_used + i * RECORD_TOKENS, b[i]);
#pragma unroll
    for (int i = 0; i < N; i++) add_chosen(chosen_slot + ((chosen_used - chosen_loaded) / RECORD_TOKENS + i) * CHOSEN_RECORD, b[i]);
    chosen_used += N * RECORD_TOKENS;
  };
  __syncwarp();
#pragma unroll 1
  for (bool is_last = count == 0; !is_last;) {
    if (at > 0 && at * CHUNKS % 32 == 0) {
      marks_now = marks_next;
      marks_next = load_marks(at * CHUNKS + 32);
    }
    is_last = at + RECORDS > whole;
    if (!is_last) {
      step(Number<RECORDS>{}, Number<0>{}, at, 0, enqueue);
      at += RECORDS;
      is_last = at == count;
    } else {
      copies.wait(0, key_phase);
      step_through_rest(at, enqueue);
    }
    if (is_last) {
      const int chosen_end = records_up_to(chosen_filled) * RECORD_TOKENS, other_end = records_up_to(other_filled) * RECORD_TOKENS;
      clear(QUEUE, chosen_filled, chosen_end);
      clear(0, other_filled, other_end);
      chosen_filled = chosen_end;
      other_filled = other_end;
    }
    __syncwarp();
    if (other_filled - other_used >= RECORDS * RECORD_TOKENS) {
      const bool is_rest_loaded = value_count - other_loaded / RECORD_TOKENS <= VALUE_PLACES;
      use_others(Number<RECORDS>{});
      if (!is_rest_loaded) {
        __syncwarp();
        start_values(other_used / RECORD_TOKENS);
        other_loaded = other_used;
        value_phase ^= 1;
      }
    }
#pragma unroll 1
    while (chosen_filled - chosen_used >= CHOSEN_RECORDS * RECORD_TOKENS) {
      use_chosen(Number<CHOSEN_RECORDS>{});
      __syncwarp();
      start_chosen(chosen_used / RECORD_TOKENS);
      chosen_loaded = chosen_used;
      chosen_phase ^= 1;
    }
  }
  if (chosen_filled > chosen_used) use_chosen(Number<1>{});
#pragma unroll 1
  while (other_filled > other_used) use_others(Number<1>{});
#else
  // Probabilities of the same tokens, in the same order.
  auto add_at_once = [&](auto size, auto is_tail, int at, int from, auto probability) __attribute__((always_inline)) {
    constexpr bool tail = decltype(is_tail)::value;
    if constexpr (!tail) copies.wait(1, value_phase);
    add_values(size, from, [&](int i, u32 (&b)[CHUNKS][2][2]) {
#pragma unroll
      for (int c = 0; c < CHUNKS; c++)
#pragma unroll
        for (int k = 0; k < 4; k++) b[c][k >> 1][k & 1] = transpose(probability(i, c, k >> 1, k & 1));
    });
    if constexpr (!tail) {
      __syncwarp();
      start_values(at + decltype(size)::value);
      value_phase ^= 1;
    }
  };
  for (; at + RECORDS <= whole; at += RECORDS) step(Number<RECORDS>{}, Number<0>{}, at, 0, add_at_once);
  if (at < count) {
    copies.wait(0, key_phase);
    copies.wait(1, value_phase);
#if !BULK
    asm volatile("cp.async.wait_group 0;" ::: "memory");
    __syncwarp();
#endif
    step_through_rest(at, add_at_once);
  }
#endif

  // Merge the warps of this block: output channel by channel for each head, in units of probability.
  u32 value_unit[3][TILES];
  if constexpr (METADATA_BITS == 4 && VALUE_SCALE == 1) {
#pragma unroll
    for (int k = 0; k < 3; k++)
#pragma unroll
      for (int m = 0; m < TILES; m++) value_unit[k][m] = value_unit_of(k, m);
  }
  __syncthreads();
  constexpr int ROW = WIDTH + 1;
  float* const gathered = reinterpret_cast<float*>(slots);  // [WARPS][8][ROW]
  float* const weights = gathered + WARPS * 8 * ROW;          // [WARPS][8][2]
  const float all0 = full0 + sum[0], all1 = full1 + sum[1];
#pragma unroll
  for (int m = 0; m < TILES; m++) {
    float extra[4] = {0.f, 0.f, 0.f, 0.f};
    if constexpr (VALUE_SCALE == 0 && VALUE_CENTRE) {
#pragma unroll
      for (int k = 0; k < 4; k++) extra[k] = -0.5f * VALUE_CENTRE * sum[k & 1];
    }
    if constexpr (VALUE_SCALE == 2 && (VALUE_STORED || VALUE_CENTRE)) {
      const float f = -0.5f * VALUE_CENTRE;
#pragma unroll
      for (int k = 0; k < 2; k++) {
        const float mine = base[0][k] + 4.f * base[1][k + 2] + f * (base[2][k] + 4.f * base[3][k + 2]);
        extra[k] = extra[k + 2] = __shfl_sync(~0u, mine, (m >> 1) * 4 + t);
      }
    }
    if constexpr (VALUE_SCALE == 1 && VALUE_STORED) {
      // base[4 i + 2 v + rr]: rows g belong to tile 4 i + 2 v, rows g + 8 to the next one.
      constexpr float f = METADATA_BITS == 4 ? 128.f * 16777216.f : 128.f;
      const int from = m / 4 * 4 + (m & 2);
#pragma unroll
      for (int k = 0; k < 4; k++) extra[k] = f * base[from + (k >> 1)][(m & 1) * 2 + (k & 1)];
      if constexpr (METADATA_BITS == 4) {
#pragma unroll
        for (int k = 0; k < 4; k++) {
          const float one = k & 2 ? half_high(value_unit[1][m]) : half_low(value_unit[1][m]);
          const float at = k & 2 ? half_high(value_unit[2][m]) : half_low(value_unit[2][m]);
          extra[k] = fmaf(fmaf(-7.f, sum[k & 1], extra[k]), one, at * sum[k & 1]);
        }
      }
    }
#pragma unroll
    for (int k = 0; k < 4; k++) {
      float unit = (k & 2 ? 1048576.f : 16777216.f) * (VALUE_BITS == 1 && m & 1 ? 0.5f : 1.f);
      if (METADATA_BITS == 4 && VALUE_SCALE == 1)
        unit *= SCALE_FIELD * (k & 2 ? half_high(value_unit[0][m]) : half_low(value_unit[0][m]));
      gathered[(warp * 8 + 2 * t + (k & 1)) * ROW + channel_of(m, k >> 1, g)] = fmaf(acc[m][k], unit, extra[k]);
    }
  }
  if (g == 0) {
    weights[(warp * 8 + 2 * t) * 2] = top0;
    weights[(warp * 8 + 2 * t) * 2 + 1] = all0;
    weights[(warp * 8 + 2 * t + 1) * 2] = top1;
    weights[(warp * 8 + 2 * t + 1) * 2 + 1] = all1;
  }
  __syncthreads();
  const Share own(heads, ratio);
  for (int i = threadIdx.x; i < own.head_count * (WIDTH / 2); i += WARPS * 32) {
    const int row_head = i / (WIDTH / 2), channel = i % (WIDTH / 2);
    float top = LOWEST, n0 = 0.f, n1 = 0.f, weight = 0.f;
#pragma unroll
    for (int w = 0; w < WARPS; w++) top = fmaxf(top, weights[(w * 8 + row_head) * 2]);
#pragma unroll
    for (int w = 0; w < WARPS; w++) {
      const float e = exp2_fast(weights[(w * 8 + row_head) * 2] - top);
      const float* states = gathered + (w * 8 + row_head) * ROW + channel;
      n0 = fmaf(e, states[0], n0);
      n1 = fmaf(e, states[WIDTH / 2], n1);
      weight = fmaf(e, weights[(w * 8 + row_head) * 2 + 1], weight);
    }
    const float inverse = weight > 0.f ? __fdividef(1.f, weight) : 0.f;
    const float log_weight = weight > 0.f ? top + log2_fast(weight) : LOWEST;
    const i64 row = own.query_row + row_head;
    if (own.splits == 1) {
      out[row * WIDTH + channel] = (u16)(pack_input(n0 * inverse, 0.f) & 0xffffu);
      out[row * WIDTH + channel + WIDTH / 2] = (u16)(pack_input(n1 * inverse, 0.f) & 0xffffu);
    } else {
      float* state = partial + (row * own.splits + own.split) * WIDTH + channel;
      state[0] = n0 * inverse;
      state[WIDTH / 2] = n1 * inverse;
      if (channel == 0) partial_weight[row * own.splits + own.split] = log_weight;
    }
  }
}

// Merges the splits of a query head, one block a head: WIDTH / 4 threads take a split, 4 channels each, and the block, of at most
// 2 * WIDTH threads, several splits at a time.
extern "C" __global__ void __launch_bounds__(2 * WIDTH)
merge(const float* __restrict__ partial, const float* __restrict__ partial_weight, u16* __restrict__ out, int splits) {
  constexpr int LANES = WIDTH / 4, MOST_PARTS = 8, AT_ONCE = 5;
  __shared__ __align__(16) float numerators[MOST_PARTS][WIDTH];
  const int lane = threadIdx.x % LANES, part = threadIdx.x / LANES, parts = blockDim.x / LANES;
  const i64 row = blockIdx.x;
  const float* const weights = partial_weight + row * splits;
  const float4* const states = reinterpret_cast<const float4*>(partial + row * splits * WIDTH) + lane;
  float4 state[AT_ONCE];
  float weight[AT_ONCE];
  auto load = [&](int first) {
#pragma unroll
    for (int k = 0; k < AT_ONCE; k++) {
      const int split = first + parts * k;
      weight[k] = NEVER;
      state[k] = make_float4(0.f, 0.f, 0.f, 0.f);
      if (split < splits) {
        weight[k] = read_fresh(weights + split);
        state[k] = read_fresh(states + split * LANES);
      }
    }
  };
  wait_for_previous();
  load(part);
  // Every warp finds the largest weight, and the sum of all, by itself.
  float top = LOWEST, sum = 0.f;
  for (int split = threadIdx.x % 32; split < splits; split += 32) {
    const float one = read_fresh(weights + split), higher = fmaxf(top, one);
    sum = sum * exp2_fast(top - higher) + exp2_fast(one - higher);
    top = higher;
  }
  float highest = top;
#pragma unroll
  for (int k = 16; k > 0; k /= 2) highest = fmaxf(highest, __shfl_xor_sync(~0u, highest, k));
  sum *= exp2_fast(top - highest);
#pragma unroll
  for (int k = 16; k > 0; k /= 2) sum += __shfl_xor_sync(~0u, sum, k);
  float4 n = make_float4(0.f, 0.f, 0.f, 0.f);
  for (int first = part;;) {
#pragma unroll
    for (int k = 0; k < AT_ONCE; k++) {
      const float e = exp2_fast(weight[k] - highest);
      n.x = fmaf(e, state[k].x, n.x);
      n.y = fmaf(e, state[k].y, n.y);
      n.z = fmaf(e, state[k].z, n.z);
      n.w = fmaf(e, state[k].w, n.w);
    }
    first += parts * AT_ONCE;
    if (first >= splits) break;
    load(first);
  }
  *reinterpret_cast<float4*>(&numerators[part][4 * lane]) = n;
  __syncthreads();
  if (threadIdx.x < WIDTH) {
    float all = 0.f;
#pragma unroll
    for (int k = 0; k < MOST_PARTS; k++)
      if (k < parts) all += numerators[k][threadIdx.x];
    out[row * WIDTH + threadIdx.x] = (u16)(pack_input(sum > 0.f ? all / sum : 0.f, 0.f) & 0xffffu);
  }
}
