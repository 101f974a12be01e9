// @ts-check
/** Random numbers as torch's generator on the processor draws them, and float16. */

/** The Mersenne Twister, seeded as `torch.Generator().manual_seed(seed)` does it (Matsumoto & Nishimura 1998). */
export class Generator {
  /** @param {number} seed from 0 to 2**32 - 1 */
  constructor(seed) {
    this.state = new Uint32Array(624);
    this.state[0] = seed >>> 0;
    for (let i = 1; i < 624; i++) {
      const before = this.state[i - 1] ^ (this.state[i - 1] >>> 30);
      this.state[i] = (Math.imul(1812433253, before) + i) >>> 0;
    }
    this.next = 624;
  }

  /** 32 random bits. @returns {number} */
  bits() {
    if (this.next === 624) {
      const s = this.state;
      for (let i = 0; i < 624; i++) {
        const y = (s[i] & 0x80000000) | (s[(i + 1) % 624] & 0x7fffffff);
        s[i] = s[(i + 397) % 624] ^ (y >>> 1) ^ (y & 1 ? 0x9908b0df : 0);
      }
      this.next = 0;
    }
    let y = this.state[this.next++];
    y ^= y >>> 11;
    y ^= (y << 7) & 0x9d2c5680;
    y ^= (y << 15) & 0xefc60000;
    return (y ^ (y >>> 18)) >>> 0;
  }

  /** Uniform in [0, 1), in steps of 2**-24 as in a float32. @returns {number} */
  uniform() {
    return (this.bits() & 0xffffff) / 0x1000000;
  }
}

/**
 * `torch.randn(n, generator=...)`: uniform numbers, then Box and Muller's transform in groups of 16 (a group takes its
 * radii from its first half and its angles from its second).
 * @param {number} n 16 or more
 * @param {Generator} generator
 * @returns {Float32Array}
 */
export function randn(n, generator) {
  if (n < 16) throw new Error(`randn of ${n} numbers: torch draws fewer than 16 in another way`);
  const data = new Float32Array(n);
  for (let i = 0; i < n; i++) data[i] = generator.uniform();
  for (let i = 0; i + 16 <= n; i += 16) transform(data, i);
  if (n % 16) {
    for (let i = n - 16; i < n; i++) data[i] = generator.uniform();
    transform(data, n - 16);
  }
  return data;
}

/** @param {Float32Array} data @param {number} start */
function transform(data, start) {
  for (let i = start; i < start + 8; i++) {
    const radius = Math.sqrt(-2 * Math.log(1 - data[i]));
    const angle = 2 * Math.PI * data[i + 8];
    data[i] = radius * Math.cos(angle);
    data[i + 8] = radius * Math.sin(angle);
  }
}

/** `torch.randperm(n, generator=...)`. @param {number} n @param {Generator} generator @returns {Uint32Array} */
export function randperm(n, generator) {
  const found = Uint32Array.from({ length: n }, (_, i) => i);
  for (let i = 0; i < n - 1; i++) {
    const j = i + (generator.bits() % (n - i));
    [found[i], found[j]] = [found[j], found[i]];
  }
  return found;
}

/** Numbers stored as float16, little-endian. @param {Uint8Array} bytes @returns {Float32Array} */
export function float16(bytes) {
  const view = new DataView(bytes.buffer, bytes.byteOffset, bytes.byteLength);
  return Float32Array.from({ length: bytes.byteLength / 2 }, (_, i) => {
    const bits = view.getUint16(2 * i, true);
    const sign = bits & 0x8000 ? -1 : 1;
    const exponent = (bits >> 10) & 31;
    const fraction = bits & 1023;
    if (exponent === 0) return sign * fraction * 2 ** -24;
    if (exponent === 31) return fraction ? NaN : sign * Infinity;
    return sign * (1024 + fraction) * 2 ** (exponent - 25);
  });
}

/** Numbers stored as float32, little-endian. @param {Uint8Array} bytes @returns {Float32Array} */
export function float32(bytes) {
  return new Float32Array(bytes.slice().buffer);
}
