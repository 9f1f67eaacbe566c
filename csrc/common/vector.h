// A vector of 16 floats in the registers of one instruction set. Included once per instruction set, inside its
// namespace and with its options (common/each_target.h), where VQ_REGISTER_BYTES says how wide a register is.

#undef VQ_INLINE
#define VQ_INLINE inline __attribute__((always_inline))

typedef float Register __attribute__((vector_size(VQ_REGISTER_BYTES)));
typedef int32_t IntRegister __attribute__((vector_size(VQ_REGISTER_BYTES)));
typedef uint16_t HalfRegister __attribute__((vector_size(VQ_REGISTER_BYTES / 2)));

// Members, not an array: GCC keeps arrays of registers in memory.
template <class V>
struct Pair {
  V low, high;
};
#if VQ_REGISTER_BYTES == 64
typedef Register Vec;
#elif VQ_REGISTER_BYTES == 32
typedef Pair<Register> Vec;
#else
typedef Pair<Pair<Register> > Vec;
#endif

template <class To, class From>
VQ_INLINE To bits(From v) {
  static_assert(sizeof(To) == sizeof(From));
  To result;
  std::memcpy(&result, &v, sizeof v);
  return result;
}

VQ_INLINE Register fill(float x) {  // x * register would be built element by element
  float lanes[VQ_REGISTER_BYTES / 4];
  for (float& lane : lanes) lane = x;
  Register r;
  std::memcpy(&r, lanes, sizeof r);
  return r;
}

VQ_INLINE void load_into(Register& r, const float* p) { std::memcpy(&r, p, sizeof r); }

VQ_INLINE IntRegister load_16_bits(const void* p) {
  HalfRegister h;
  std::memcpy(&h, p, sizeof h);
  return __builtin_convertvector(h, IntRegister);
}

VQ_INLINE void load_into(Register& r, const BFloat16* p) { r = bits<Register>(load_16_bits(p) << 16); }

VQ_INLINE void load_into(Register& r, const Half* p) {
  const IntRegister h = load_16_bits(p), exponent = h & 0x7c00, rebased = ((h & 0x7fff) << 13) + (112 << 23);
  const IntRegister special = exponent == 0x7c00;  // infinity, NaN
  // A subnormal number of Half, without one of float: those may be flushed to zero.
  const Register small = bits<Register>(rebased + (1 << 23)) - fill(0x1p-14f);
  const Register magnitude = exponent == 0 ? small : bits<Register>(rebased);
  r = bits<Register>(bits<IntRegister>(magnitude) | (special & 0x7f800000) | ((h & 0x8000) << 16));
}

VQ_INLINE void store(float* p, Register r) { std::memcpy(p, &r, sizeof r); }

VQ_INLINE void store(BFloat16* p, Register r) {  // to nearest, ties to even; NaN stays NaN
  const IntRegister u = bits<IntRegister>(r), rounded = u + 0x7fff + ((u >> 16) & 1);
  const HalfRegister h = __builtin_convertvector((r == r ? rounded : (u | 0x400000)) >> 16, HalfRegister);
  std::memcpy(p, &h, sizeof h);
}

VQ_INLINE void store(Half* p, Register r) {
  float lanes[VQ_REGISTER_BYTES / 4];
  store(lanes, r);
  for (const float lane : lanes) *p++ = static_cast<Half>(lane);
}

VQ_INLINE Register maximum(Register a, Register b) { return a > b ? a : b; }

VQ_INLINE Register zero_where_below(Register v, Register a, float bound) { return a < fill(bound) ? Register{} : v; }

constexpr float kExpMin = -87.33654f;  // exp of it is the smallest normal number

VQ_INLINE Register clamp_exponent(Register x) { return x < fill(kExpMin) ? fill(kExpMin) : x; }

VQ_INLINE Register exp_nonpositive(Register exponent) {
  const Register magic = fill(12582912.f);  // 1.5 * 2^23: adding it rounds to an integer
  const Register x = clamp_exponent(exponent), shifted = x * fill(1.44269504088896341f) + magic, n = shifted - magic;
  const Register r = (x - n * fill(0.693359375f)) - n * fill(-2.12194440e-4f);
  Register p = fill(1.9875691500e-4f) * r + fill(1.3981999507e-3f);
  p = p * r + fill(8.3334519073e-3f);
  p = p * r + fill(4.1665795894e-2f);
  p = p * r + fill(1.6666665459e-1f);
  p = p * r + fill(5.0000001201e-1f);
  p = p * r * r + r + fill(1.f);
  const Register power = bits<Register>((bits<IntRegister>(shifted) << 23) + (127 << 23));  // 2^n
  return zero_where_below(p * power, exponent, kExpMin);
}

// The same of pairs.
template <class V>
VQ_INLINE Pair<V> operator+(Pair<V> a, Pair<V> b) {
  return {a.low + b.low, a.high + b.high};
}
template <class V>
VQ_INLINE Pair<V> operator-(Pair<V> a, Pair<V> b) {
  return {a.low - b.low, a.high - b.high};
}
template <class V>
VQ_INLINE Pair<V> operator*(Pair<V> a, Pair<V> b) {
  return {a.low * b.low, a.high * b.high};
}
template <class V>
VQ_INLINE Pair<V> operator/(Pair<V> a, Pair<V> b) {
  return {a.low / b.low, a.high / b.high};
}
template <class V>
VQ_INLINE void operator+=(Pair<V>& a, Pair<V> b) {
  a.low += b.low, a.high += b.high;
}
template <class V>
VQ_INLINE Pair<V> maximum(Pair<V> a, Pair<V> b) {
  return {maximum(a.low, b.low), maximum(a.high, b.high)};
}
template <class V>
VQ_INLINE Pair<V> zero_where_below(Pair<V> v, Pair<V> a, float bound) {
  return {zero_where_below(v.low, a.low, bound), zero_where_below(v.high, a.high, bound)};
}
template <class V>
VQ_INLINE Pair<V> clamp_exponent(Pair<V> x) {
  return {clamp_exponent(x.low), clamp_exponent(x.high)};
}
template <class V>
VQ_INLINE Pair<V> exp_nonpositive(Pair<V> x) {
  return {exp_nonpositive(x.low), exp_nonpositive(x.high)};
}
template <class V, class T>
VQ_INLINE void load_into(Pair<V>& v, const T* p) {
  load_into(v.low, p), load_into(v.high, p + sizeof(V) / 4);
}
template <class V, class T>
VQ_INLINE void store(T* p, Pair<V> v) {
  store(p, v.low), store(p + sizeof(V) / 4, v.high);
}

// What loops use: load, load_last, store, broadcast, + - * / +=, and
//   maximum(a, b): b where a is NaN;   zero_where_below(v, a, bound): 0 where a < bound, else v
//   clamp_exponent(x): x, or kExpMin where it is smaller, so that 0 exp(-inf) is no NaN
//   exp_nonpositive(x): exp(x) for x <= 0 to about 1 ulp, 0 below kExpMin; NaN stays NaN
template <class T>
VQ_INLINE Vec load(const T* p) {
  Vec v;
  load_into(v, p);
  return v;
}

// The last `count` values of a row, filled up.
template <class T>
VQ_INLINE Vec load_last(const T* p, int64_t count, float fill) {
  float lanes[kLanes];
  for (int64_t i = 0; i < kLanes; ++i) lanes[i] = i < count ? float(p[i]) : fill;
  return load(lanes);
}

VQ_INLINE Vec broadcast(float x) {
  const Register r = fill(x);
#if VQ_REGISTER_BYTES == 64
  return r;
#elif VQ_REGISTER_BYTES == 32
  return {r, r};
#else
  return {{r, r}, {r, r}};
#endif
}

VQ_INLINE float horizontal_max(Vec v) {  // any number or NaN where there is a NaN
  float lanes[kLanes];
  store(lanes, v);
  for (int step = kLanes / 2; step > 0; step /= 2)
    for (int i = 0; i < step; ++i) lanes[i] = lanes[i + step] > lanes[i] ? lanes[i + step] : lanes[i];
  return lanes[0];
}

VQ_INLINE float horizontal_sum(Vec v) {
  float lanes[kLanes];
  store(lanes, v);
  for (int step = kLanes / 2; step > 0; step /= 2)
    for (int i = 0; i < step; ++i) lanes[i] += lanes[i + step];
  return lanes[0];
}

// out[i] = sum of v[i]
VQ_INLINE void horizontal_sums(Vec (&v)[kLanes], float* out) {
#if VQ_REGISTER_BYTES == 64
  const IntRegister low8 = {0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23};
  const IntRegister low4 = {0, 1, 2, 3, 16, 17, 18, 19, 8, 9, 10, 11, 24, 25, 26, 27};
  const IntRegister low2 = {0, 1, 16, 17, 4, 5, 20, 21, 8, 9, 24, 25, 12, 13, 28, 29};
  const IntRegister low1 = {0, 16, 2, 18, 4, 20, 6, 22, 8, 24, 10, 26, 12, 28, 14, 30};
  const auto fold = [&](int i, int step, IntRegister low) __attribute__((always_inline)) {
    v[i] = __builtin_shuffle(v[i], v[i + step], low) + __builtin_shuffle(v[i], v[i + step], low + step);
  };
#pragma GCC unroll 8
  for (int i = 0; i < 8; ++i) fold(i, 8, low8);
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) fold(i, 4, low4);
#pragma GCC unroll 2
  for (int i = 0; i < 2; ++i) fold(i, 2, low2);
  fold(0, 1, low1);
  store(out, v[0]);
#else
#pragma GCC unroll 16
  for (int i = 0; i < kLanes; ++i) out[i] = horizontal_sum(v[i]);
#endif
}
