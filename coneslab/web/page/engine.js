// @ts-check
/**
 * The worker that loads the model and draws, so that the page never waits for it.
 *
 * It is sent {kind: "load", backend} once, then {kind: "draw", id, tasks, edits} as often as wanted: a later request
 * overtakes an earlier one between two steps. It sends back "loading", "ready" or "failed", and for each request
 * "words", "step", "picture", "done" or "error".
 */
import { Generator, float16, float32, randn } from "./numbers.js";
import { Tokenizer } from "./tokenizer.js";
import { heatMaps, joined, keysAndValues, randomMask, readEdit } from "./weights.js";

/**
 * @typedef {{column: string, key: string, prompt: string, seed: number, steps: number, guidance: number,
 *   edits: string[], dose: number, preview: boolean}} Task a picture to draw; column: "untouched", "edit" or "random"
 * @typedef {import("./weights.js").Mask} Mask
 */

const REBUILD = "reload the page; if that does not help, the site is incomplete: build it again with `make web`";
const CONTROL_SEED = 0; // of the random mask
const NEAR = 0.05; // how far what is computed may be from what Python computed; int8 weights are within 0.04

/** @type {any} */ let manifest;
/** @type {any} */ let ort;
/** @type {Record<string, any>} */ const sessions = {};
/** @type {Map<string, Float32Array>} */ const texts = new Map();
/** @type {Map<string, Promise<any[]>>} */ const edits = new Map();
/** @type {Tokenizer} */ let tokenizer;
/** @type {Float32Array} */ let theta;
let loaded = 0;
let newest = 0; // the request that counts

/** Something that the reader is told in a sentence. */
class Told extends Error {}

/** @param {any} message @param {Transferable[]} [moved] */
const send = (message, moved = []) => postMessage(message, { transfer: moved });
const pause = () => new Promise((go) => setTimeout(go));

onmessage = async ({ data }) => {
  if (data.kind === "load") {
    try {
      await load(data.backend);
    } catch (error) {
      send({ kind: "failed", message: sentence(error) });
    }
  } else {
    newest = data.id;
    await pause(); // of many requests that came at once, the last one counts
    try {
      await draw(data);
    } catch (error) {
      send({ kind: "error", id: data.id, message: sentence(error) });
    }
  }
};

/** @param {any} error */
function sentence(error) {
  if (error instanceof Told) return error.message;
  const text = String(error?.message ?? error);
  if (/memory|allocat/i.test(text)) return `There is too little memory for the model (${text}): close other pages.`;
  return `Something unforeseen went wrong (${text}): ${REBUILD}.`;
}

// --- loading ---------------------------------------------------------------------------------------------

/** A file of this folder, checked. @param {string} name @returns {Promise<Uint8Array>} */
async function file(name) {
  const { bytes, sha256 } = manifest.files[name];
  const data = new Uint8Array(bytes);
  let at = 0;
  const reader = (await answer(`${name}?v=${sha256.slice(0, 12)}`, name)).body.getReader();
  for (;;) {
    const { done, value } = await reader.read().catch((/** @type {any} */ error) => {
      throw new Told(`The file ${name} broke off after ${at.toLocaleString("en")} bytes (${error.message}): ${REBUILD}.`);
    });
    if (done) break;
    if (at + value.length > bytes) throw damaged(name, `more than ${bytes.toLocaleString("en")} bytes`);
    data.set(value, at);
    at += value.length;
    loaded += value.length;
    send({ kind: "loading", done: loaded, what: name });
  }
  if (at < bytes) throw damaged(name, `${at.toLocaleString("en")} of ${bytes.toLocaleString("en")} bytes`);
  if (crypto.subtle) { // only where the page is served safely
    const sum = new Uint8Array(await crypto.subtle.digest("SHA-256", data));
    if ([...sum].map((byte) => byte.toString(16).padStart(2, "0")).join("") !== sha256) throw damaged(name, "other contents");
  }
  return data;
}

/** @param {string} name @param {string} has */
const damaged = (name, has) => new Told(`The file ${name} is damaged, it has ${has}: ${REBUILD}.`);

/** @param {string} address @param {string} name @param {RequestInit} [options] @returns {Promise<any>} */
async function answer(address, name, options) {
  const found = await fetch(new URL(address, import.meta.url), options).catch((error) => {
    throw new Told(`The file ${name} could not be loaded (${error.message}): check the network, then ${REBUILD}.`);
  });
  if (!found.ok) throw new Told(`The file ${name} is missing (the server says ${found.status}): ${REBUILD}.`);
  return found;
}

/** @param {string} backend "auto", "wasm" or "webgpu" */
async function load(backend) {
  if (typeof WebAssembly === "undefined")
    throw new Told("This browser has WebAssembly turned off, which the model computes with: turn it on, or use another browser.");
  const given = await answer("manifest.json", "manifest.json", { cache: "no-cache" });
  manifest = await given.json().catch(() => {
    throw damaged("manifest.json", "no complete JSON");
  });
  if (!manifest.runtime)
    throw new Told(
      "This page was built without ONNX Runtime, which computes the model: build it again with a connection to the npm registry (`make web`).",
    );
  const graphics = backend === "wasm" ? null : await card(backend === "webgpu");
  const threads = globalThis.crossOriginIsolated ? Math.max(1, Math.min(navigator.hardwareConcurrency || 1, 4)) : 1;
  const kinds = graphics ? ["webgpu", "wasm"] : ["wasm"];
  const [script, glue, binary] = manifest.runtime.files[kinds[0]].map((/** @type {string} */ name) => `runtime/${name}`);
  const names = [binary, "text_encoder.onnx", "unet.onnx", "decoder.onnx", "keys_and_values.bin"];
  const total = names.reduce((sum, name) => sum + manifest.files[name].bytes, 0);
  send({ kind: "loading", done: 0, total, what: "" });
  const [wasm, encoder, unet, decoder, matrices] = await Promise.all(names.map(file));
  send({ kind: "loading", done: total, total, what: "", preparing: true });
  const at = (/** @type {string} */ name) => new URL(`${name}?v=${manifest.files[name].sha256.slice(0, 12)}`, import.meta.url).href;
  ort = await import(at(script)).catch(() => {
    throw new Told(`The file ${script} is missing or damaged: ${REBUILD}.`);
  });
  ort.env.logLevel = "error";
  ort.env.wasm.numThreads = threads;
  ort.env.wasm.wasmPaths = { mjs: at(glue), wasm: at(binary) };
  ort.env.wasm.wasmBinary = wasm.buffer;
  const options = { executionProviders: kinds, logSeverityLevel: 3 };
  try {
    for (const [name, data] of Object.entries({ encoder, unet, decoder }))
      sessions[name] = await ort.InferenceSession.create(data, options);
  } catch (error) {
    if (!graphics || backend === "webgpu") throw error;
    throw new Told("again"); // the page starts anew, without the graphics card
  }
  theta = manifest.precision === "float32" ? float32(matrices) : float16(matrices);
  tokenizer = new Tokenizer(manifest.tokenizer);
  if (!(await right())) {
    if (graphics && backend === "auto") throw new Told("again");
    throw new Told(`This browser computes something else than the model (on ${graphics ? "its graphics card" : "the processor"}): use another one.`);
  }
  const { words, edits, layers, start, picture, latents, sampler } = manifest;
  const shown = { words, edits, layers, start, picture, latents, mostSteps: sampler.length, length: tokenizer.given.length };
  send({ kind: "ready", manifest: shown, backend: kinds[0], threads });
}

/** Whether there is a graphics card to compute with. @param {boolean} any one that the processor imitates, too */
async function card(any) {
  const gpu = /** @type {any} */ (navigator).gpu;
  const adapter = await gpu?.requestAdapter().catch(() => null);
  if (any && !adapter) throw new Told("This browser offers no WebGPU: leave out `backend=webgpu` from the address.");
  return adapter && (any || !(adapter.info?.isFallbackAdapter ?? adapter.isFallbackAdapter)) ? adapter : null;
}

/**
 * Compute everything once, which makes the next time several times as fast, and compare it with what Python computed.
 * @returns {Promise<boolean>}
 */
async function right() {
  const { prompt, timestep, output, pixels } = manifest.check;
  const given = { theta, layers: manifest.layers, parts: [], dose: 0, texts: [await embedding(""), await embedding(prompt)], ids: [[], []] };
  const noise = randn(size(), new Generator(0));
  const predicted = await predict(noise, timestep, tensors(keysAndValues(given)));
  /** @type {(found: Float32Array, expected: number[]) => boolean} */
  const near = (found, expected) =>
    expected.every((value, i) => Math.abs(found[i * Math.floor(found.length / 32)] - value) < NEAR * (1 + Math.abs(value)));
  return near(predicted.output.subarray(size()), output) && near(await planes(noise), pixels);
}

const size = () => manifest.latents.reduce((/** @type {number} */ a, /** @type {number} */ b) => a * b, 1);

// --- drawing ---------------------------------------------------------------------------------------------

/** @param {{id: number, tasks: Task[], edits: string[], prompt: string}} request */
async function draw({ id, tasks, edits: chosen, prompt }) {
  const parts = (await Promise.all(chosen.map(edit))).flat();
  if (id !== newest) return;
  const masks = /** @type {Mask[]} */ (parts.filter((part) => part.kind === "mask"));
  const pieces = tokenizer.pieces(prompt);
  send({ kind: "words", id, pieces, where: heatMaps(masks, manifest.layers, 24) });
  for (const task of tasks) {
    if (!(await picture(id, task, parts))) return;
  }
  send({ kind: "done", id });
}

/** The parts of an edit, loaded when it is first wanted. @param {string} name @returns {Promise<any[]>} */
function edit(name) {
  const entry = manifest.edits.find((/** @type {any} */ one) => one.name === name);
  const known = edits.get(name) ?? file(entry.file).then((data) => readEdit(data, entry.parts, manifest.layers));
  edits.set(name, known);
  known.catch(() => edits.delete(name));
  return known;
}

/**
 * Draw one picture, and show it step by step. @param {number} id @param {Task} task @param {any[]} parts of the edits
 * @returns {Promise<boolean>} false if a later request came
 */
async function picture(id, task, parts) {
  const { column, key, steps, guidance, preview } = task;
  const table = manifest.sampler[steps - 1];
  let acting = column === "untouched" ? [] : parts;
  if (column === "random")
    acting = joined(parts.filter((part) => part.kind === "mask")).map((mask) => randomMask(mask, manifest.layers, CONTROL_SEED));
  const prompts = ["", task.prompt];
  const embeddings = [await embedding(""), await embedding(task.prompt)];
  const ids = prompts.map((text) => tokenizer.encode(text));
  const given = { theta, layers: manifest.layers, parts: acting, dose: task.dose, texts: embeddings, ids };
  const projected = tensors(keysAndValues(given));
  const start = randn(size(), new Generator(task.seed)).map((value) => value * table.start);
  let x = start;
  /** @type {Float32Array[]} */ const outputs = [];
  const attention = new Float32Array(tokenizer.given.length * manifest.latents[1] * manifest.latents[2]);
  for (const [step, time] of table.timesteps.entries()) {
    const { output, shares } = await predict(x, time, projected);
    const out = new Float32Array(x.length);
    for (let i = 0; i < out.length; i++) out[i] = output[i] + guidance * (output[x.length + i] - output[i]);
    outputs.push(out);
    shares.forEach((/** @type {number} */ share, /** @type {number} */ i) => (attention[i] += share / table.timesteps.length));
    const [first, ...others] = table.rows[step];
    const next = new Float32Array(x.length);
    for (let i = 0; i < next.length; i++) {
      let sum = first * start[i];
      for (let j = 0; j < others.length; j++) sum += others[j] * outputs[j][i];
      next[i] = sum;
    }
    const [a, b] = table.clean[step];
    const sketch = !preview && a !== undefined ? sketched(x, out, a, b) : null;
    x = next;
    await pause(); // for later requests to come in
    if (id !== newest) return false;
    send({ kind: "step", id, column, step: step + 1, steps: table.timesteps.length, sketch, preview });
  }
  const pixels = coloured(await planes(x));
  if (id !== newest) return false;
  send({ kind: "picture", id, column, key, pixels, attention, preview }, [pixels.buffer, attention.buffer]);
  return true;
}

/** The embedding of a text, (tokens, width). @param {string} text @returns {Promise<Float32Array>} */
async function embedding(text) {
  const known = texts.get(text);
  if (known) return known;
  const ids = new ort.Tensor("int32", tokenizer.encode(text), [1, tokenizer.given.length]);
  const found = (await sessions.encoder.run({ ids })).text.data;
  texts.set(text, found);
  return found;
}

/** @param {Map<string, Float32Array>} projected */
function tensors(projected) {
  const tokens = tokenizer.given.length;
  return Object.fromEntries(
    manifest.layers.map((/** @type {any} */ { name, shape }) => [
      name,
      new ort.Tensor("float32", projected.get(name), [2, tokens, shape[0]]),
    ]),
  );
}

/** The network's output for both texts, and the attention. @param {Float32Array} x @param {number} time @param {any} projected */
async function predict(x, time, projected) {
  const both = new Float32Array(2 * x.length);
  both.set(x);
  both.set(x, x.length);
  const sample = new ort.Tensor("float32", both, [2, ...manifest.latents]);
  const timestep = new ort.Tensor("float32", Float32Array.of(time), [1]);
  const { output, attention } = await sessions.unet.run({ sample, timestep, ...projected });
  return { output: output.data, shares: attention.data };
}

/** @param {Float32Array} x latents @returns {Promise<Float32Array>} red, green and blue in about [-1, 1] */
async function planes(x) {
  const latents = new ort.Tensor("float32", x, [1, ...manifest.latents]);
  return (await sessions.decoder.run({ latents })).pixels.data;
}

/** @param {Float32Array} given red, green and blue in about [-1, 1] @returns {Uint8ClampedArray} with opacity, for a canvas */
function coloured(given) {
  const count = given.length / 3;
  const found = new Uint8ClampedArray(4 * count).fill(255);
  for (let i = 0; i < count; i++) for (let c = 0; c < 3; c++) found[4 * i + c] = (given[c * count + i] / 2 + 0.5) * 255;
  return found;
}

/** The clean latents that a step predicts, as a small picture. @param {Float32Array} x @param {Float32Array} out @param {number} a @param {number} b */
function sketched(x, out, a, b) {
  const [channels, height, width] = manifest.latents;
  const count = height * width;
  const colours = new Float32Array(3 * count);
  manifest.preview.forEach((/** @type {number[]} */ row, /** @type {number} */ c) => {
    for (let i = 0; i < count; i++) {
      let sum = row[channels];
      for (let k = 0; k < channels; k++) sum += row[k] * (a * x[k * count + i] + b * out[k * count + i]);
      colours[c * count + i] = sum;
    }
  });
  return coloured(colours);
}
