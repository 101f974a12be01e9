// @ts-check
/** The page: what the reader sets, what the worker draws, and the address that says it all. */
import { readState, writeState } from "./state.js";
import { suggest } from "./suggest.js";

/**
 * @typedef {import("./state.js").State} State
 * @typedef {{pixels: Uint8ClampedArray, attention: Float32Array, preview: boolean}} Drawn
 * @typedef {"untouched" | "random" | "edit"} Column
 */

const PREVIEW_STEPS = 4;
const KEPT = 60; // pictures
/** @type {Column[]} */ const COLUMNS = ["untouched", "random", "edit"];
const NAMES = { untouched: "in the untouched model", random: "with a random mask", edit: "with the edit" };
const still = matchMedia("(prefers-reduced-motion: reduce)");

/** @template {HTMLElement} T @param {string} id @returns {T} */
const at = (id) => /** @type {T} */ (document.getElementById(id));
/** @type {HTMLInputElement} */ const prompt = at("prompt");
/** @type {HTMLInputElement} */ const dose = at("dose");
const numbers = Object.fromEntries(["seed", "steps", "guidance"].map((name) => [name, /** @type {HTMLInputElement} */ (at(name))]));

/** @type {any} */ let model; // what the worker says of it
/** @type {Worker} */ let worker;
/** @type {State} */ let state;
/** @type {{text: string, places: number[], pieces: string[]}[]} */ let words = [];
let asked = 0;
let hovered = "";
/** @type {Map<string, Drawn>} */ const kept = new Map();
/** @type {Partial<Record<Column, Drawn>>} */ const shown = {};

// --- starting ----------------------------------------------------------------------------------------------

/** Ask for the headers that threads need, from a service worker, where the host does not send them. @returns {Promise<boolean>} whether the page is loading anew */
async function isolated() {
  if (crossOriginIsolated || !isSecureContext || !("serviceWorker" in navigator)) return false;
  try {
    if (sessionStorage.getItem("isolated")) return false; // once: where it did not help, one thread will do
    sessionStorage.setItem("isolated", "asked");
    await navigator.serviceWorker.register("isolated.js");
    await navigator.serviceWorker.ready;
    location.reload();
    return true;
  } catch {
    return false; // private windows may forbid it
  }
}

/** @param {string} message */
function failed(message) {
  at("problem").textContent = message;
  at("problem").hidden = false;
  at("loading").hidden = true;
}

/** @param {string} backend */
function start(backend) {
  worker = new Worker(new URL("engine.js", import.meta.url), { type: "module" });
  worker.onerror = (event) => {
    event.preventDefault();
    failed("The part of the page that computes could not be started: use a current browser, or reload the page; if that does not help, build the site again with `make web`.");
  };
  let total = 1;
  worker.onmessage = ({ data }) => {
    if (data.kind === "loading") {
      total = data.total ?? total;
      const mega = (/** @type {number} */ bytes) => (bytes / 1e6).toFixed(1);
      at("loading-text").textContent = data.preparing
        ? "All is loaded. Preparing the model …"
        : `Loading the model: ${mega(data.done)} of ${mega(total)} MB`;
      const bar = /** @type {HTMLProgressElement} */ (at("loading-bar"));
      if (data.preparing) bar.removeAttribute("value");
      else bar.value = data.done / total;
    } else if (data.kind === "ready") ready(data);
    else if (data.kind === "failed" && data.message === "again") (worker.terminate(), start("wasm"));
    else if (data.kind === "failed") failed(data.message);
    else if (data.id === asked) answer(data);
  };
  worker.postMessage({ kind: "load", backend });
}

/** @param {any} data */
function ready(data) {
  model = data.manifest;
  const how = data.backend === "webgpu" ? "your graphics card (WebGPU)" : `your processor (WebAssembly, ${data.threads} ${data.threads === 1 ? "thread" : "threads"})`;
  at("machine").textContent = `Computed by ${how}. Nothing that you type leaves this page.`;
  document.documentElement.dataset.backend = `${data.backend} ${data.threads}`;
  for (const edit of model.edits) {
    const label = document.createElement("label");
    const box = document.createElement("input");
    box.type = "checkbox";
    box.value = edit.name;
    box.addEventListener("change", () => {
      const chosen = [...document.querySelectorAll("#shelf input:checked")].map((one) => /** @type {HTMLInputElement} */ (one).value);
      const own = state.prompt !== promptOf(state.edits); // the reader's, which is kept
      change({ edits: chosen, prompt: own ? state.prompt : promptOf(chosen) || state.prompt });
    });
    label.append(box, edit.title);
    at("shelf").append(label);
  }
  if (!model.edits.length) at("shelf").textContent = "This page was built without edits.";
  numbers.steps.max = String(model.mostSteps);
  suggest(prompt, at("suggestions"), model.words);
  at("loading").hidden = true;
  at("lab").hidden = false;
  follow();
}

/** What to draw with some edits: an edit's own prompt, or what several are about in one. @param {string[]} names @returns {string} */
function promptOf(names) {
  const chosen = model.edits.filter((/** @type {any} */ edit) => names.includes(edit.name));
  return chosen.length === 1 ? chosen[0].prompt : chosen.map((/** @type {any} */ edit) => edit.phrase).filter(Boolean).join(" and ");
}

// --- the state ---------------------------------------------------------------------------------------------

/** Take the state from the address. */
function follow() {
  const { state: found, wrong } = readState(location.hash, model);
  at("problem").hidden = !wrong.length;
  at("problem").textContent = wrong.length ? `The address cannot be followed in full: ${wrong.join("; ")}. What it leaves open is at its start.` : "";
  state = found;
  draw();
}

/** @param {Partial<State>} changes */
function change(changes) {
  state = { ...state, ...changes };
  history.replaceState(null, "", writeState(state));
  at("problem").hidden = true;
  draw();
}

function showControls() {
  if (document.activeElement !== prompt || prompt.value.trim() !== state.prompt) prompt.value = state.prompt;
  dose.value = String(state.dose);
  at("dose-value").textContent = `${Math.round(100 * state.dose)} %`;
  dose.setAttribute("aria-valuetext", `${Math.round(100 * state.dose)} percent`);
  for (const name of /** @type {("seed" | "steps" | "guidance")[]} */ (["seed", "steps", "guidance"])) numbers[name].value = String(state[name]);
  for (const box of /** @type {NodeListOf<HTMLInputElement>} */ (document.querySelectorAll("#shelf input"))) box.checked = state.edits.includes(box.value);
}

// --- drawing -----------------------------------------------------------------------------------------------

/** Whether some of the chosen edits are masks, which a random mask can stand beside. */
const masked = () =>
  model.edits.some((/** @type {any} */ edit) => state.edits.includes(edit.name) && edit.parts.some((/** @type {any} */ part) => part.kind === "mask"));

/** What decides a column's picture. @param {Column} column @param {number} steps */
function key(column, steps) {
  const { prompt, seed, guidance, edits, dose } = state;
  const plain = column === "untouched" || !edits.length || dose === 0;
  return JSON.stringify(plain ? [prompt, seed, steps, guidance] : [prompt, seed, steps, guidance, column, edits, dose]);
}

/** @param {Column} column */
const wanted = (column) => column === "untouched" || (column === "edit" ? state.edits.length > 0 : masked());

/** Draw what is not there yet: first the untouched model, then the edit, soon in a few steps, then the random mask. */
function draw() {
  showControls();
  asked += 1;
  /** @type {any[]} */ const tasks = [];
  const { prompt, seed, steps, guidance, edits, dose } = state;
  /** @type {Column[]} */ const order = ["untouched", "edit", "random"];
  for (const column of order) {
    const figure = figureOf(column);
    figure.classList.toggle("empty", !wanted(column));
    if (!wanted(column)) {
      delete shown[column];
      about(column, edits.length ? "an ablation has none" : "choose an edit");
      paint(column);
      continue;
    }
    const full = key(column, steps);
    const known = kept.get(full);
    if (known) {
      show(column, known);
      continue;
    }
    if (tasks.some((task) => task.key === full)) continue; // the same picture, at dose 0
    const task = { column, key: full, prompt, seed, steps, guidance, edits, dose, preview: false };
    const soon = key(column, PREVIEW_STEPS);
    if (column === "edit" && shown.edit && steps > PREVIEW_STEPS) {
      const sketch = kept.get(soon);
      if (sketch) show(column, { ...sketch, preview: true });
      else tasks.push({ ...task, key: soon, steps: PREVIEW_STEPS, preview: true });
    }
    tasks.push(task);
    about(column, "waiting");
  }
  at("status").textContent = tasks.length ? "Drawing …" : "Drawn.";
  worker.postMessage({ kind: "draw", id: asked, tasks, edits, prompt });
}

/** @param {any} data what the worker sends of the newest request */
function answer(data) {
  if (data.kind === "words") (readWords(data.pieces), where(data.where));
  else if (data.kind === "step") {
    const { column, step, steps, sketch, preview } = data;
    progress(column, step / (steps + 1));
    about(column, `${preview ? "preview, " : ""}step ${step} of ${steps}`);
    if (sketch && !still.matches && !shown[/** @type {Column} */ (column)]?.preview) paintSketch(column, sketch);
  } else if (data.kind === "picture") {
    const { column, key: found, pixels, attention, preview } = data;
    kept.set(found, { pixels, attention, preview: false });
    while (kept.size > KEPT) kept.delete(/** @type {string} */ (kept.keys().next().value));
    show(column, { pixels, attention, preview });
    if (!preview) for (const other of COLUMNS) if (wanted(other) && key(other, state.steps) === found) show(other, { pixels, attention, preview });
  } else if (data.kind === "done") at("status").textContent = "Drawn.";
  else if (data.kind === "error") {
    at("problem").textContent = data.message;
    at("problem").hidden = false;
    at("status").textContent = "";
  }
}

/** @param {Column} column @returns {HTMLElement} */
const figureOf = (column) => /** @type {HTMLElement} */ (document.querySelector(`figure[data-column="${column}"]`));
/** @param {Column} column @returns {HTMLCanvasElement} */
const canvasOf = (column) => /** @type {HTMLCanvasElement} */ (figureOf(column).querySelector("canvas"));

/** @param {Column} column @param {string} text */
function about(column, text) {
  /** @type {HTMLElement} */ (figureOf(column).querySelector(".about")).textContent = text;
}

/** @param {Column} column @param {number} share */
function progress(column, share) {
  /** @type {HTMLProgressElement} */ (figureOf(column).querySelector("progress")).value = share;
}

/** @param {Column} column @param {Drawn} drawn */
function show(column, drawn) {
  shown[column] = drawn;
  progress(column, drawn.preview ? 0.1 : 0);
  about(column, drawn.preview ? `preview in ${PREVIEW_STEPS} steps` : "");
  paint(column);
  tell();
}

/** Paint a column's picture, and over it the attention of the word that is pointed at. @param {Column} column */
function paint(column) {
  const canvas = canvasOf(column);
  const drawn = shown[column];
  const [height, width] = model.picture;
  const times = Math.max(1, Math.round(256 / width));
  if (canvas.width !== width * times) [canvas.width, canvas.height] = [width * times, height * times];
  const context = /** @type {CanvasRenderingContext2D} */ (canvas.getContext("2d"));
  context.clearRect(0, 0, canvas.width, canvas.height);
  canvas.dataset.state = drawn ? (drawn.preview ? "preview" : "drawn") : "empty";
  if (!drawn) {
    canvas.setAttribute("aria-label", "No picture");
    return;
  }
  context.imageSmoothingEnabled = false;
  context.drawImage(bitmap(drawn.pixels, width, height), 0, 0, canvas.width, canvas.height);
  canvas.setAttribute("aria-label", `“${state.prompt}”, ${NAMES[column]}, seed ${state.seed}${drawn.preview ? ", a preview" : ""}`);
  const map = attentionOf(column);
  if (!map) return;
  const [, rows, columns] = model.latents;
  const most = Math.max(...map, 1e-9);
  const shade = new Uint8ClampedArray(4 * map.length);
  map.forEach((share, i) => (shade[4 * i + 3] = 225 * (1 - share / most)));
  context.imageSmoothingEnabled = true;
  context.drawImage(bitmap(shade, columns, rows), 0, 0, canvas.width, canvas.height);
}

/** @param {Column} column @param {Uint8ClampedArray} pixels on the grid of latents */
function paintSketch(column, pixels) {
  const canvas = canvasOf(column);
  const context = /** @type {CanvasRenderingContext2D} */ (canvas.getContext("2d"));
  const [, rows, columns] = model.latents;
  canvas.dataset.state = "drawing";
  context.imageSmoothingEnabled = true;
  context.drawImage(bitmap(pixels, columns, rows), 0, 0, canvas.width, canvas.height);
}

/** @param {Uint8ClampedArray} pixels @param {number} width @param {number} height */
function bitmap(pixels, width, height) {
  const made = document.createElement("canvas");
  [made.width, made.height] = [width, height];
  made.getContext("2d")?.putImageData(new ImageData(/** @type {any} */ (pixels), width, height), 0, 0);
  return made;
}

// --- words -------------------------------------------------------------------------------------------------

/** Words of the prompt as the model reads them. @param {{id: number, text: string, last: boolean}[]} pieces */
function readWords(pieces) {
  words = [];
  let open = null;
  const most = model.length - 2;
  for (const [i, { text, last }] of pieces.slice(0, most).entries()) {
    open ??= { text: "", places: /** @type {number[]} */ ([]), pieces: /** @type {string[]} */ ([]) };
    open.text += text;
    open.places.push(i + 1); // after the start token
    open.pieces.push(text);
    if (!last) continue;
    words.push(open);
    open = null;
  }
  if (open) words.push(open);
  const unread = pieces.slice(most).map(({ text, last }) => text + (last ? " " : "")).join("").trim();
  const split = words.filter((word) => word.pieces.length > 1).map((word) => word.text);
  const told = [
    unread && `The model reads ${most} tokens, which leaves out “${unread}”.`,
    split.length && `The model has no word for ${split.map((word) => `“${word}”`).join(", ")}: it spells ${split.length > 1 ? "them" : "it"}.`,
  ].filter(Boolean);
  at("prompt-note").textContent = told.join(" ");
  at("prompt-note").hidden = !told.length;
  const focus = /** @type {HTMLElement} */ (document.activeElement)?.dataset?.word;
  at("words").replaceChildren(
    ...words.map((word) => {
      const button = document.createElement("button");
      button.type = "button";
      button.dataset.word = word.text;
      button.append(...word.pieces.flatMap((piece, i) => (i ? [cut(), piece] : [piece])));
      button.setAttribute("aria-label", word.text);
      button.addEventListener("pointerenter", () => point(word.text));
      button.addEventListener("pointerleave", () => point(""));
      button.addEventListener("focus", () => point(word.text));
      button.addEventListener("blur", () => point(""));
      button.addEventListener("click", () => {
        state = { ...state, word: state.word === word.text ? "" : word.text };
        history.replaceState(null, "", writeState(state));
        if (!state.word) hovered = "";
        highlight();
      });
      return button;
    }),
  );
  if (focus) /** @type {HTMLElement | undefined} */ ([...at("words").children].find((one) => /** @type {HTMLElement} */ (one).dataset.word === focus))?.focus();
  highlight();
}

function cut() {
  const mark = document.createElement("span");
  mark.className = "cut";
  mark.textContent = "·";
  return mark;
}

/** @param {string} word */
function point(word) {
  hovered = word;
  highlight();
}

/** The attention of the word pointed at, or kept: mean over its places. @param {Column} column @returns {Float32Array | null} */
function attentionOf(column) {
  const word = hovered || state.word;
  const places = words.filter((one) => one.text === word).flatMap((one) => one.places);
  const drawn = shown[column];
  if (!places.length || !drawn) return null;
  const size = model.latents[1] * model.latents[2];
  return Float32Array.from({ length: size }, (_, i) => places.reduce((sum, place) => sum + drawn.attention[place * size + i], 0) / places.length);
}

function highlight() {
  for (const button of /** @type {NodeListOf<HTMLElement>} */ (document.querySelectorAll("#words button")))
    button.setAttribute("aria-pressed", String(button.dataset.word === state.word));
  COLUMNS.forEach(paint);
  tell();
}

/** Say in words what the attention map of the word shows. */
function tell() {
  const word = hovered || state.word;
  const told = COLUMNS.filter((column) => shown[column]).map((column) => {
    const map = attentionOf(column);
    return map && `at the ${place(map)} (${Math.round(100 * Math.max(...map))} %) ${NAMES[column]}`;
  });
  at("word-note").textContent = word && told.some(Boolean) ? `The attention to “${word}” is largest ${told.filter(Boolean).join(", ")}.` : "";
}

/** Where a map is largest, in words. @param {Float32Array} map */
function place(map) {
  const [, rows, columns] = model.latents;
  const where = map.indexOf(Math.max(...map));
  const down = ["top", "middle", "bottom"][Math.floor((3 * Math.floor(where / columns)) / rows)];
  const across = ["left", "centre", "right"][Math.floor((3 * (where % columns)) / columns)];
  return down === "middle" && across === "centre" ? "centre" : `${down} ${across}`;
}

// --- where the shut neurons lie ----------------------------------------------------------------------------

/** @param {{label: string, shut: number, size: number, rows: number, columns: number, density: Float32Array}[]} maps */
function where(maps) {
  const shut = maps.reduce((sum, map) => sum + map.shut, 0);
  const all = maps.reduce((sum, map) => sum + map.size, 0);
  at("where-note").textContent = shut
    ? `${shut.toLocaleString("en")} of ${all.toLocaleString("en")} key and value weights (${((100 * shut) / all).toFixed(1)} %) in ${maps.length} matrices: down, what the matrix writes; across, what it reads of the text. The stronger the colour, the denser.`
    : "No neurons are shut: choose a mask.";
  const colour = getComputedStyle(document.documentElement).getPropertyValue("--shut");
  const most = Math.max(1e-9, ...maps.flatMap((map) => [...map.density]));
  at("where").replaceChildren(
    ...(shut ? maps : []).map(({ label, shut: own, size, rows, columns, density }) => {
      const figure = document.createElement("figure");
      const canvas = document.createElement("canvas");
      [canvas.width, canvas.height] = [columns, rows];
      canvas.setAttribute("role", "img");
      const share = ((100 * own) / size).toFixed(1);
      canvas.setAttribute("aria-label", `${label}: ${share} % shut`);
      const context = /** @type {CanvasRenderingContext2D} */ (canvas.getContext("2d"));
      context.fillStyle = colour;
      density.forEach((value, i) => {
        context.globalAlpha = Math.sqrt(value / most);
        context.fillRect(i % columns, Math.floor(i / columns), 1, 1);
      });
      const caption = document.createElement("figcaption");
      caption.append(label, document.createElement("br"), `${share} %`);
      figure.append(canvas, caption);
      return figure;
    }),
  );
}

// --- controls ----------------------------------------------------------------------------------------------

prompt.addEventListener("keydown", (event) => {
  if (event.key === "Enter") prompt.dispatchEvent(new Event("change"));
});
prompt.addEventListener("change", () => {
  const text = prompt.value.trim();
  if (text !== state.prompt) change({ prompt: text });
});
dose.addEventListener("input", () => change({ dose: Number(dose.value) }));
for (const [name, input] of Object.entries(numbers))
  input.addEventListener("change", () => {
    const value = Number(input.value);
    const valid = input.value.trim() && value >= Number(input.min) && value <= Number(input.max || 100) && (name === "guidance" || Number.isInteger(value));
    if (valid) return change({ [name]: value });
    at("problem").textContent = `The ${name} is “${input.value}”: give ${name === "guidance" ? "a number" : "a whole number"} from ${input.min} to ${input.max}.`;
    at("problem").hidden = false;
    input.value = String(state[/** @type {"seed" | "steps" | "guidance"} */ (name)]);
  });
at("another").addEventListener("click", () => change({ seed: (state.seed + 1) % 2 ** 32 }));
at("copy").addEventListener("click", async () => {
  history.replaceState(null, "", writeState(state));
  try {
    await navigator.clipboard.writeText(location.href);
    at("status").textContent = "Copied: whoever opens it sees the same pictures.";
  } catch {
    at("status").textContent = "The clipboard cannot be written: copy the address from the browser’s own line.";
  }
});
addEventListener("hashchange", () => model && follow());
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => model && draw());

if (location.protocol !== "file:" && !(await isolated())) start(new URLSearchParams(location.search).get("backend") ?? "auto");
