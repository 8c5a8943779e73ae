// Activation functions of reference/activations.py and their derivatives, in float32; gelu is accurate in both tails.
#pragma once
#include "exponential.h"

namespace {

struct Linear {
  static void both(vf z, vf& value, vf& slope) { value = z, slope = splat(1); }
};

struct Relu {
  static void both(vf z, vf& value, vf& slope) {
    value = z < 0 ? vf{} : z;
    slope = z <= 0 ? vf{} : splat(1);
  }
};

struct LeakyRelu {
  static void both(vf z, vf& value, vf& slope) {
    slope = z > 0 ? splat(1) : splat(0.01f);
    value = z * slope;
  }
};

constexpr float TAIL[] = {-3.16251826e-05f, 0.000120541772f, 0.000141412238f, -0.000907231239f, -0.00185517594f,
                          0.00497325091f,   0.0331580117f,   0.0901214406f,   0.161589071f,     0.212690309f};

struct Gelu {  // z Φ(z), Φ'(z) = φ(z) = exp(-z²/2) / sqrt(2π); Φ(-|z|) = exp(-z²/2) u TAIL(2 u - 1), u = 3.5 / (3.5 + |z|)
  static void both(vf z, vf& value, vf& slope) {
    const vf t = (vf)((vi)z & 0x7fffffff), e = exp(-0.5f * t * t), u = 3.5f / (3.5f + t), v = 2.0f * u - 1.0f;
    const vf tail = e * u * polynomial(TAIL, v), below = z > 0 ? 1.0f - tail : tail;
    value = z * below;
    slope = fma(z, 0.398942280f * e, below);
  }
};

inline vf rest(vf z, vf s, vf e) { return z > 0 ? e * s : 1.0f - s; }  // 1 - s of s = 1 / (1 + e), e < 1 where z > 0

struct GeluNew {  // z σ(2 w), w = sqrt(2/π) (z + 0.044715 z³): half of 1 + tanh(w) is σ(2 w)
  static void both(vf z, vf& value, vf& slope) {
    const float root = 0.797884561f, cubic = 0.044715f;
    const vf w = root * fma(cubic * z * z, z, z), e = exp(-2.0f * w), s = 1.0f / (1.0f + e);
    value = z * s;
    slope = fma(2.0f * value * rest(z, s, e), root * fma(3 * cubic * z, z, splat(1)), s);
  }
};

struct Silu {
  static void both(vf z, vf& value, vf& slope) {
    const vf e = exp(-z), s = 1.0f / (1.0f + e);
    value = z * s;
    slope = s * fma(z, rest(z, s, e), splat(1));
  }
};

struct Tanh {
  static void both(vf z, vf& value, vf& slope) {
    value = tanh(z);
    slope = fma(-value, value, splat(1));
  }
};

template <class A> inline vf value_of(vf z) {
  vf value, slope;
  A::both(z, value, slope);
  return value;
}

// f(Linear{}), ..., by the place that native.py gives a name.
template <class F> inline void with_activation(int activation, F f) {
  switch (activation) {
    case 0: return f(Linear{});
    case 1: return f(Relu{});
    case 2: return f(LeakyRelu{});
    case 3: return f(Gelu{});
    case 4: return f(GeluNew{});
    case 5: return f(Silu{});
    default: return f(Tanh{});
  }
}

constexpr int64_t PART_ELEMENTS = 1 << 14;

// f(m, n, some) for every vector of [M, N], some <= L elements of it, as many rows to a thread as are worth one.
template <class F> inline void each_vector(int64_t M, int64_t N, int threads, F f) {
  const int64_t rows = N < PART_ELEMENTS ? PART_ELEMENTS / (N + 1) + 1 : 1;
  parallel(threads, parts_of(M, rows), [&](int64_t part) {
    for (int64_t m = part * rows; m < at_most((part + 1) * rows, M); m++)
      for (int64_t n = 0; n < N; n += L) f(m, n, at_most(L, N - n));
  });
}

template <class D> inline vf read(const typename D::T* p, int64_t some) {
  return some == L ? D::widen(p) : widen_some<D>(p, some);
}
template <class D> inline void write(typename D::T* p, vf v, int64_t some) {
  if (some == L) D::narrow(p, v);
  else narrow_some<D>(p, v, some);
}

// h = act(z) and, where there is one, d = d act'(z), for z = s + bias [M, R] in float32; bias is read up to a multiple of
// 64.
template <class A>
void activated(float* h, float* d, const float* s, const float* bias, int64_t M, int64_t R, int threads) {
  each_vector(M, R, threads, [&](int64_t m, int64_t r, int64_t some) {
    const int64_t at = m * R + r;
    vf z = read<F32>(s + at, some), value, slope;
    if (bias) z += load<vf>(bias + r);
    A::both(z, value, slope);
    write<F32>(h + at, value, some);
    if (d) write<F32>(d + at, read<F32>(d + at, some) * slope, some);
  });
}

// h = act(g) u.
template <class A, class D>
void gated(typename D::T* h, const typename D::T* g, int64_t ldg, const typename D::T* u, int64_t ldu, int64_t M,
           int64_t N, int threads) {
  each_vector(M, N, threads, [&](int64_t m, int64_t n, int64_t some) {
    const vf value = value_of<A>(read<D>(g + m * ldg + n, some));
    write<D>(h + m * N + n, value * read<D>(u + m * ldu + n, some), some);
  });
}

// h = act(g) u, dg = dh u act'(g), du = dh act(g); dg may take the memory of dh.
template <class A, class D>
void gated_gradients(typename D::T* h, typename D::T* dg, typename D::T* du, const typename D::T* dh, int64_t ldh,
                     const typename D::T* g, int64_t ldg, const typename D::T* u, int64_t ldu, int64_t M, int64_t N,
                     int threads) {
  each_vector(M, N, threads, [&](int64_t m, int64_t n, int64_t some) {
    const vf up = read<D>(u + m * ldu + n, some), d = read<D>(dh + m * ldh + n, some);
    vf value, slope;
    A::both(read<D>(g + m * ldg + n, some), value, slope);
    const int64_t at = m * N + n;
    write<D>(h + at, value * up, some);
    write<D>(du + at, d * value, some);
    write<D>(dg + at, d * up * slope, some);
  });
}

}  // namespace
