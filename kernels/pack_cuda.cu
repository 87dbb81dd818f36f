// From the portable layout of packed.py to records in fragment order; see fragments.py for both orders. A block makes one record.
// Compile-time constants as for attend_cuda.cu, and
//   BYTES   1: codes are bytes [B, H, T, C], and metadata codes of 4 bits lie in `scale`, a byte for scale and offset of a channel

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef long long i64;

constexpr int NARROW_STEPS = KEY_STEPS - WIDE_STEPS;
constexpr int TILES = WIDTH / 16;
constexpr int KEY_CODES = WIDE_STEPS * 128 + NARROW_STEPS * 64;
constexpr int KEY_PAIRS = (KEY_STEPS + 1) / 2;
// Words of 32 tokens in the source.
constexpr int KEY_WORDS = BYTES ? 8 * CHANNELS : CHANNELS + WIDE_CHANNELS;
constexpr int VALUE_WORDS = BYTES ? 8 * WIDTH : VALUE_BITS * WIDTH;
constexpr int KEY_METADATA = METADATA_BITS == 4 ? KEY_STEPS * 16 : KEY_PAIRS * 64 + (STORED_STEPS / 2) * 64 + (STORED_STEPS % 2) * 32;
constexpr int KEY_RECORD = CHUNKS * KEY_CODES + KEY_METADATA;
constexpr int VALUE_CODES = TILES * 64 * VALUE_BITS;
constexpr int VALUE_METADATA = VALUE_SCALE == 1 ? WIDTH * METADATA_BITS / 8 : VALUE_SCALE == 2 ? WIDTH * 2 * CHUNKS : 0;
constexpr int VALUE_RECORD = CHUNKS * VALUE_CODES + VALUE_METADATA * (VALUE_STORED || METADATA_BITS == 4 ? 2 : 1);

// Code of one token of a channel, given the words of 32 tokens.
__device__ __forceinline__ u32 code_of(const u32* words, int bits, int channels, int channel, int token) {
  if (BYTES) return reinterpret_cast<const u8*>(words)[token * channels + channel];
  return bits == 2 ? words[(token >> 4) * channels + channel] >> (2 * (token & 15)) & 3u : words[channel] >> token & 1u;
}

__device__ __forceinline__ u32 key_code_of(const u32* words, int channel, int token) {
  if (BYTES) return code_of(words, 2, CHANNELS, channel, token);
  if (channel < WIDE_CHANNELS) return code_of(words, 2, WIDE_CHANNELS, channel, token);
  return code_of(words + 2 * WIDE_CHANNELS, 1, CHANNELS - WIDE_CHANNELS, channel - WIDE_CHANNELS, token);
}

// Metadata code of 4 bits of a channel, given those of a group; 0 if it has none.
__device__ __forceinline__ u32 nibble_of(const u8* codes, int channels, int channel) {
  return codes && channel < channels ? codes[channel >> 1] >> 4 * (channel & 1) & 15u : 0u;
}

// Both metadata codes of a channel of a group in a byte, given those of all groups; `stored` channels have an offset.
__device__ __forceinline__ u8 metadata_of(const u8* scale, const u8* offset, i64 group, int channels, int stored, int channel) {
  if (BYTES) return channel < channels ? scale[group * channels + channel] : 0;
  const u32 scale_code = nibble_of(scale + group * ((channels + 1) / 2), channels, channel);
  return (u8)(scale_code << 4 | nibble_of(offset ? offset + group * ((stored + 1) / 2) : nullptr, stored, channel));
}

// Where the words of lane `lane` of fragment `step` of `steps` begin, in words: fragments in fours, then two, then one.
__device__ __forceinline__ int lane_word(int step, int steps, int lane) {
  const int whole = steps / 4 * 4;
  if (step < whole) return (step / 4 * 32 + lane) * 4 + step % 4;
  const int left = steps - whole, at = step - whole;
  if (left >= 2 && at < 2) return whole * 32 + lane * 2 + at;
  return (steps - 1) * 32 + lane;
}

__device__ __forceinline__ void raise_to(float* largest, float value) {
#pragma unroll
  for (int k = 16; k > 0; k /= 2) value = fmaxf(value, __shfl_xor_sync(~0u, value, k));
  if ((threadIdx.x & 31) == 0) atomicMax(reinterpret_cast<int*>(largest), __float_as_int(value));
}

__device__ __forceinline__ float size_of(u16 half) {
  float y;
  asm("{ .reg .f16 h; mov.b16 h, %1; cvt.f32.f16 %0, h; }" : "=f"(y) : "h"(half));
  return fabsf(y);
}

// Records of sequence b go behind its first `starts[b]` tokens; it has `counts[b]` new ones. Blocks: records, heads, sequences.
extern "C" __global__ void pack_keys(const u32* codes, const u8* scale, const u8* offset, i64 groups, int stored, const int* starts,
                                     const int* counts, u8* records, i64 capacity, float* scale_max) {
  const int record = blockIdx.x, batch = blockIdx.z, thread = threadIdx.x;
  if (record * 32 * CHUNKS >= counts[batch]) return;
  const i64 bh = (i64)batch * gridDim.y + blockIdx.y, group = bh * groups + record;
  u8* const out = records + (bh * capacity + starts[batch] / (32 * CHUNKS) + record) * KEY_RECORD;
  constexpr int PAIRS = NARROW_STEPS / 2, WORDS = WIDE_STEPS + PAIRS + NARROW_STEPS % 2;
  for (int i = thread; i < CHUNKS * WORDS * 32; i += blockDim.x) {
    const int lane = i % 32, word = i / 32 % WORDS, chunk = i / (32 * WORDS), g = lane >> 2, t = lane & 3;
    const u32* words = codes + (group * CHUNKS + chunk) * KEY_WORDS;
    u8* const at = out + chunk * KEY_CODES;
    const bool is_wide = word < WIDE_STEPS, is_last = NARROW_STEPS % 2 && word == WORDS - 1;
    u32 packed = 0;
    for (int parity = 0; parity < (is_wide || is_last ? 1 : 2); parity++) {
      const int step = is_wide ? word : WIDE_STEPS + 2 * (word - WIDE_STEPS) + parity;
      for (int column = 0; column < 4; column++) {
        const int kh = column >> 1, e = column & 1, channel = 16 * step + 8 * kh + 2 * t + e;
        if (channel >= CHANNELS) continue;
        for (int row = 0; row < 4; row++) {
          const int m = row >> 1, rr = row & 1;
          const u32 code = key_code_of(words, channel, 16 * m + 8 * rr + g);
          packed |= code << (is_last ? 8 * e + m + 4 * rr + 2 * kh : 16 * e + 8 * m + 4 * rr + 2 * kh + parity);
        }
      }
    }
    if (is_wide) reinterpret_cast<u32*>(at)[lane_word(word, WIDE_STEPS, lane)] = packed;
    else if (is_last) reinterpret_cast<u16*>(at + WIDE_STEPS * 128 + PAIRS * 128)[lane] = (u16)packed;
    else reinterpret_cast<u32*>(at + WIDE_STEPS * 128)[lane_word(word - WIDE_STEPS, PAIRS, lane)] = packed;
  }
#if METADATA_BITS == 4
  for (int i = thread; i < KEY_STEPS * 16; i += blockDim.x) {
    // The words of four fragments are neighbours in a lane t, then of two, then of one.
    constexpr int whole = KEY_STEPS / 4 * 4, left = KEY_STEPS - whole;
    const int word = i >> 2, kh = i & 1, e = i >> 1 & 1, at = word - whole * 4;
    const bool is_four = at < 0, is_two = !is_four && left >= 2 && at < 8;
    const int step = is_four ? word / 16 * 4 + word % 4 : is_two ? whole + at % 2 : KEY_STEPS - 1;
    const int t = is_four ? word / 4 % 4 : is_two ? at / 2 : at - (left >= 2 ? 8 : 0);
    const int channel = 16 * step + 8 * kh + 2 * t + e;
    out[CHUNKS * KEY_CODES + i] = metadata_of(scale, offset, group, CHANNELS, stored, channel);
  }
#else
  u16* const halves = reinterpret_cast<u16*>(out + CHUNKS * KEY_CODES);
  float largest = 0.f;
  for (int i = thread; i < KEY_PAIRS * 32 + STORED_STEPS * 16; i += blockDim.x) {
    const bool is_scale = i < KEY_PAIRS * 32;
    const int k = is_scale ? i : i - KEY_PAIRS * 32, steps = is_scale ? KEY_PAIRS * 2 : STORED_STEPS, e = k & 1, kh = k >> 1 & 1;
    const bool is_single = k / 32 >= steps / 2;
    const int step = is_single ? steps - 1 : k / 32 * 2 + (k >> 2 & 1), t = is_single ? k >> 2 & 3 : k >> 3 & 3;
    const int channel = 16 * step + 8 * kh + 2 * t + e, count = is_scale ? CHANNELS : stored;
    const u16 half = channel < count ? reinterpret_cast<const u16*>(is_scale ? scale : offset)[group * count + channel] : (u16)0;
    halves[i] = half;
    if (is_scale) largest = fmaxf(largest, size_of(half));
  }
  raise_to(scale_max + bh, largest);
#endif
}

// `entries` is the room of the source, in tokens.
extern "C" __global__ void pack_values(const u32* codes, const u8* scale, const u8* offset, i64 entries, const int* starts,
                                       const int* counts, u8* records, i64 capacity, float* scale_max) {
  const int record = blockIdx.x, batch = blockIdx.z, thread = threadIdx.x;
  if (record * 32 * CHUNKS >= counts[batch]) return;
  const i64 bh = (i64)batch * gridDim.y + blockIdx.y;
  u8* const out = records + (bh * capacity + starts[batch] / (32 * CHUNKS) + record) * VALUE_RECORD;
  constexpr int WORDS = TILES * VALUE_BITS / 2;
  for (int i = thread; i < CHUNKS * WORDS * 32; i += blockDim.x) {
    const int lane = i % 32, word = i / 32 % WORDS, chunk = i / (32 * WORDS), g = lane >> 2, t = lane & 3;
    const u32* words = codes + (bh * (entries / 32) + record * CHUNKS + chunk) * VALUE_WORDS;
    u32 packed = 0;
    for (int parity = 0; parity < (VALUE_BITS == 1 ? 2 : 1); parity++) {
      const int tile = VALUE_BITS == 1 ? 2 * word + parity : word;
      for (int rr = 0; rr < 2; rr++) {
        const int channel = 32 * (tile >> 1) + 8 * (g >> 1) + 4 * (tile & 1) + 2 * rr + (g & 1);
        for (int k = 0; k < 8; k++) {
          const int m = k >> 2, kh = k >> 1 & 1, e = k & 1;
          packed |= code_of(words, VALUE_BITS, WIDTH, channel, 16 * m + 8 * kh + 2 * t + e) << (16 * e + 8 * m + 4 * rr + 2 * kh + parity);
        }
      }
    }
    reinterpret_cast<u32*>(out + chunk * VALUE_CODES)[lane_word(word, WORDS, lane)] = packed;
  }
#if METADATA_BITS == 4
  for (int i = thread; i < VALUE_METADATA * 2; i += blockDim.x) {
    const int g = i / (2 * TILES), j = i / 4 % (TILES / 2), rr = i >> 1 & 1, parity = i & 1;
    const int channel = 32 * j + 8 * (g >> 1) + 4 * parity + 2 * rr + (g & 1);
    out[CHUNKS * VALUE_CODES + i] = metadata_of(scale, offset, bh * (entries / (32 * CHUNKS)) + record, WIDTH, WIDTH, channel);
  }
#else
  float largest = 0.f;
  u16* const halves = reinterpret_cast<u16*>(out + CHUNKS * VALUE_CODES);
  for (int i = thread; i < VALUE_METADATA / 2 * (VALUE_STORED ? 2 : 1); i += blockDim.x) {
    const bool is_scale = i < VALUE_METADATA / 2;
    const int k = is_scale ? i : i - VALUE_METADATA / 2;
    i64 at;
    bool is_held = true;
    if (VALUE_SCALE == 2) {
      const int e = k & 1, kh = k >> 1 & 1, m = k >> 2 & 1, t = k >> 3 & 3, group = k / 32 % (WIDTH / 32), chunk = k / WIDTH;
      const int token = (record * CHUNKS + chunk) * 32 + 16 * m + 8 * kh + 2 * t + e;
      is_held = token < counts[batch];
      at = (bh * entries + token) * (WIDTH / 32) + group;
    } else {
      const int rr = k & 1, tile = k / 2 % TILES, g = k / (2 * TILES);
      at = (bh * (entries / (32 * CHUNKS)) + record) * WIDTH + 32 * (tile >> 1) + 8 * (g >> 1) + 4 * (tile & 1) + 2 * rr + (g & 1);
    }
    const u16 half = is_held ? reinterpret_cast<const u16*>(is_scale ? scale : offset)[at] : (u16)0;
    halves[i] = half;
    if (is_scale) largest = fmaxf(largest, size_of(half));
  }
  if (VALUE_SCALE) raise_to(scale_max + bh, largest);
#endif
}
