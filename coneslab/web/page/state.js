// @ts-check
/**
 * What is drawn, as the address says it: #prompt=a+cat&seed=3&steps=10&guidance=3&edits=cat,dog&dose=1&word=cat
 *
 * @typedef {{prompt: string, seed: number, steps: number, guidance: number, edits: string[], dose: number, word: string}} State
 * @typedef {{edits: {name: string, title: string, prompt: string, parts: any[]}[], mostSteps: number,
 *   start: {sampler_steps: number, guidance_scale: number}}} Choices
 */

/** Where the page starts. @param {Choices} choices @returns {State} */
export function initial({ edits, start }) {
  const first = edits[0];
  return {
    prompt: first?.prompt || "a cat on the grass",
    seed: 0,
    steps: start.sampler_steps,
    guidance: start.guidance_scale,
    edits: first ? [first.name] : [],
    dose: 1,
    word: "",
  };
}

/**
 * Read an address. What makes no sense is left at its start, and told.
 * @param {string} hash @param {Choices} choices @returns {{state: State, wrong: string[]}}
 */
export function readState(hash, choices) {
  const state = initial(choices);
  const given = new URLSearchParams(hash.replace(/^#/, ""));
  /** @type {string[]} */ const wrong = [];
  /** @type {(name: "seed" | "steps" | "guidance" | "dose", least: number, most: number, whole: boolean) => void} */
  const number = (name, least, most, whole) => {
    const text = given.get(name);
    if (text === null) return;
    const value = Number(text);
    if (text.trim() && value >= least && value <= most && (!whole || Number.isInteger(value))) state[name] = value;
    else wrong.push(`${name} is “${text}”, expected ${whole ? "a whole number" : "a number"} from ${least} to ${most}`);
  };
  number("seed", 0, 2 ** 32 - 1, true);
  number("steps", 1, choices.mostSteps, true);
  number("guidance", 0, 100, false);
  number("dose", 0, 1, false);
  state.prompt = given.get("prompt") ?? state.prompt;
  state.word = given.get("word") ?? state.word;
  const names = given.get("edits")?.split(",").filter(Boolean);
  if (names) {
    const known = choices.edits.map((edit) => edit.name);
    for (const name of names.filter((name) => !known.includes(name))) wrong.push(`there is no edit “${name}” on the shelf`);
    state.edits = known.filter((name) => names.includes(name));
  }
  return { state, wrong };
}

/** @param {State} state @returns {string} */
export function writeState({ prompt, seed, steps, guidance, edits, dose, word }) {
  const values = { prompt, seed, steps, guidance, edits: edits.join(","), dose, ...(word ? { word } : {}) };
  const text = new URLSearchParams(Object.entries(values).map(([name, value]) => [name, String(value)])).toString();
  return `#${text.replaceAll("%2C", ",")}`;
}
