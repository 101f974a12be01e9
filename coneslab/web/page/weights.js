// @ts-check
/**
 * Edits of the keys and values of cross-attention: masks, doses, unions, masks at some words only, ablations.
 *
 * All K-V weights lie end to end in one vector θ, layer after layer, each a matrix (channels out, text width).
 */
import { Generator, float16, float32, randperm } from "./numbers.js";

/**
 * @typedef {{label: string, name: string, kind: string, resolution: number, shape: [number, number], start: number}} Layer
 * @typedef {{kind: "mask", indices: Uint32Array, scales: Float32Array, scope: number[][]}} Mask
 * @typedef {{kind: "delta", factors: Map<string, {rank: number, left: Float32Array, right: Float32Array}>}} Delta
 * @typedef {{kind: string, bytes: number, count?: number, graded?: boolean, scope?: number[][],
 *   ranks?: Record<string, number>}} Entry what the manifest says of a part of an edit
 */

/** The parts of an edit, from its file. @param {Uint8Array} bytes @param {Entry[]} entries @param {Layer[]} layers */
export function readEdit(bytes, entries, layers) {
  let start = 0;
  return entries.map((entry) => {
    const part = bytes.subarray(start, (start += entry.bytes));
    return entry.kind === "mask" ? readMask(part, entry) : readDelta(part, entry, layers);
  });
}

/** @param {Uint8Array} bytes @param {Entry} entry @returns {Mask} */
function readMask(bytes, entry) {
  const indices = new Uint32Array(entry.count ?? 0);
  let at = 0;
  let index = 0;
  for (let i = 0; i < indices.length; i++) {
    let shift = 0;
    let gap = 0;
    do gap |= (bytes[at] & 127) << shift, (shift += 7);
    while (bytes[at++] & 128);
    indices[i] = index += gap;
  }
  const scales = entry.graded ? float32(bytes.subarray(at)) : new Float32Array(indices.length);
  return { kind: "mask", indices, scales, scope: entry.scope ?? [] };
}

/** @param {Uint8Array} bytes @param {Entry} entry @param {Layer[]} layers @returns {Delta} */
function readDelta(bytes, entry, layers) {
  const numbers = float16(bytes);
  let start = 0;
  /** @type {Delta["factors"]} */
  const factors = new Map();
  for (const { name, shape } of layers) {
    const rank = entry.ranks?.[name] ?? 0;
    if (!rank) continue;
    const left = numbers.subarray(start, (start += shape[0] * rank));
    const right = numbers.subarray(start, (start += rank * shape[1]));
    factors.set(name, { rank, left, right });
  }
  return { kind: "delta", factors };
}

/**
 * As many neurons as a mask has, at the same scales, at random places in the same layers: `random_neurons` in Python.
 * @param {Mask} mask @param {Layer[]} layers @param {number} seed @returns {Mask}
 */
export function randomMask(mask, layers, seed) {
  const generator = new Generator(seed);
  const indices = new Uint32Array(mask.indices.length);
  let first = 0;
  for (const { start, shape } of layers) {
    const size = shape[0] * shape[1];
    let last = first;
    while (last < mask.indices.length && mask.indices[last] < start + size) last++;
    const places = randperm(size, generator).slice(0, last - first);
    indices.set(places.map((place) => place + start).sort(), first);
    first = last;
  }
  return { ...mask, indices };
}

/**
 * Masks that act at the same words as one: the union of their neurons, the smaller scale of each (Cones, Sec. 3.2).
 * @param {Mask[]} masks @returns {Mask[]} one for each scope
 */
export function joined(masks) {
  /** @type {Map<string, {scope: number[][], scales: Map<number, number>}>} */
  const found = new Map();
  for (const mask of masks) {
    const key = JSON.stringify(mask.scope);
    const one = found.get(key) ?? { scope: mask.scope, scales: new Map() };
    found.set(key, one);
    mask.indices.forEach((index, i) => one.scales.set(index, Math.min(mask.scales[i], one.scales.get(index) ?? 1)));
  }
  return [...found.values()].map(({ scope, scales }) => {
    const indices = Uint32Array.from(scales.keys()).sort();
    return { kind: "mask", indices, scales: Float32Array.from(indices, (index) => scales.get(index) ?? 1), scope };
  });
}

/** Scale the neurons of a mask, in place: a scale s acts as 1 - dose (1 - s). @param {Float32Array} theta @param {Mask} mask @param {number} dose */
function scale(theta, mask, dose) {
  mask.indices.forEach((index, i) => (theta[index] *= 1 - dose * (1 - mask.scales[i])));
}

/** Add dose times a change of the matrices, in place. @param {Float32Array} theta @param {Delta} delta @param {Layer[]} layers @param {number} dose */
function add(theta, delta, layers, dose) {
  for (const { name, start, shape } of layers) {
    const factor = delta.factors.get(name);
    if (!factor) continue;
    const { rank, left, right } = factor;
    const width = shape[1];
    for (let row = 0; row < shape[0]; row++) {
      for (let k = 0; k < rank; k++) {
        const weight = dose * left[row * rank + k];
        for (let i = 0; i < width; i++) theta[start + row * width + i] += weight * right[k * width + i];
      }
    }
  }
}

/**
 * Where a subject stands among token ids: its token wherever it occurs, and the first class word after each.
 * @param {ArrayLike<number>} ids @param {number[][]} words its token, then its class word if it has one @returns {number[]}
 */
export function positions(ids, words) {
  const [token, ...others] = words;
  /** @type {(word: number[], start: number, end: number) => number[]} */
  const occurrences = (word, start, end) => {
    const places = [];
    for (let at = start; at + word.length <= end; at++) if (word.every((id, i) => ids[at + i] === id)) places.push(at);
    return places;
  };
  /** @type {Set<number>} */
  const found = new Set();
  const starts = occurrences(token, 0, ids.length);
  starts.forEach((start, number) => {
    token.forEach((_, i) => found.add(start + i));
    for (const word of others) {
      const after = occurrences(word, start + token.length, starts[number + 1] ?? ids.length)[0];
      if (after !== undefined) word.forEach((_, i) => found.add(after + i));
    }
  });
  return [...found].sort((a, b) => a - b);
}

/**
 * Keys and values of texts under edits: the masks of each scope joined, then the ablations.
 * @param {{theta: Float32Array, layers: Layer[], parts: (Mask | Delta)[], dose: number,
 *   texts: Float32Array[], ids: ArrayLike<number>[]}} given texts: (tokens, width) each; ids: of their tokens
 * @returns {Map<string, Float32Array>} layer name -> (texts, tokens, channels out)
 */
export function keysAndValues({ theta, layers, parts, dose, texts, ids }) {
  const masks = joined(/** @type {Mask[]} */ (parts.filter((part) => part.kind === "mask")));
  const edited = theta.slice();
  for (const mask of masks) if (!mask.scope.length) scale(edited, mask, dose);
  for (const part of parts) if (part.kind === "delta") add(edited, part, layers, dose);
  const found = projected(edited, layers, texts);
  const scoped = masks.filter((mask) => mask.scope.length && dose);
  texts.forEach((text, number) => {
    const where = scoped.map((mask) => positions(ids[number], mask.scope));
    /** @type {Map<string, number[]>} which masks act -> at which tokens */
    const groups = new Map();
    for (const at of new Set(where.flat())) {
      const acting = JSON.stringify(where.flatMap((places, i) => (places.includes(at) ? [i] : [])));
      groups.set(acting, [...(groups.get(acting) ?? []), at]);
    }
    for (const [acting, places] of groups) {
      const own = edited.slice();
      for (const i of JSON.parse(acting)) scale(own, scoped[i], dose);
      const width = layers[0].shape[1];
      const rows = Float32Array.from(places.flatMap((at) => [...text.subarray(at * width, (at + 1) * width)]));
      for (const [name, values] of projected(own, layers, [rows])) {
        const channels = values.length / places.length;
        const all = /** @type {Float32Array} */ (found.get(name));
        const tokens = all.length / texts.length / channels;
        places.forEach((at, i) =>
          all.set(values.subarray(i * channels, (i + 1) * channels), (number * tokens + at) * channels),
        );
      }
    }
  });
  return found;
}

/** @param {Float32Array} theta @param {Layer[]} layers @param {Float32Array[]} texts @returns {Map<string, Float32Array>} */
function projected(theta, layers, texts) {
  return new Map(
    layers.map(({ name, start, shape: [channels, width] }) => {
      const tokens = texts[0].length / width;
      const out = new Float32Array(texts.length * tokens * channels);
      texts.forEach((text, number) => {
        for (let token = 0; token < tokens; token++) {
          for (let row = 0; row < channels; row++) {
            let sum = 0;
            for (let i = 0, w = start + row * width, t = token * width; i < width; i++) sum += theta[w + i] * text[t + i];
            out[(number * tokens + token) * channels + row] = sum;
          }
        }
      });
      return [name, out];
    }),
  );
}

/**
 * How densely a mask shuts each layer, on a coarse grid of its matrix, for a heat map.
 * @param {Mask[]} masks @param {Layer[]} layers @param {number} side of the grid
 * @returns {{label: string, shut: number, size: number, rows: number, columns: number, density: Float32Array}[]}
 */
export function heatMaps(masks, layers, side) {
  const indices = new Set(masks.flatMap((mask) => [...mask.indices.filter((_, i) => mask.scales[i] < 0.5)]));
  return layers.map(({ label, start, shape: [channels, width] }) => {
    const rows = Math.min(side, channels);
    const columns = Math.min(side, width);
    const density = new Float32Array(rows * columns);
    const cells = new Float32Array(rows * columns);
    let shut = 0;
    for (let i = 0; i < channels * width; i++) {
      const cell = Math.floor((Math.floor(i / width) * rows) / channels) * columns + Math.floor(((i % width) * columns) / width);
      cells[cell]++;
      if (indices.has(start + i)) (density[cell]++, shut++);
    }
    return { label, shut, size: channels * width, rows, columns, density: density.map((n, i) => n / cells[i]) };
  });
}
