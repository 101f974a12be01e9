// @ts-check
/** CLIP's tokenizer: byte pairs, as the fast tokenizer of transformers splits them. */

/**
 * @typedef {{length: number, begin: number, end: number, pad: number, unknown: number,
 *   vocabulary: Record<string, number>, merges: string[],
 *   added: {content: string, id: number, single_word: boolean, special: boolean}[]}} Vocabulary
 * @typedef {{id: number, text: string, last: boolean}} Piece a token; last: whether a word ends with it
 */

const WORD = /'s|'t|'re|'ve|'m|'ll|'d|\p{L}+|\p{N}|[^\s\p{L}\p{N}]+/gu;

/** Bytes as printable letters, as GPT-2 writes them. */
const LETTERS = (() => {
  const plain = [...range(33, 126), ...range(161, 172), ...range(174, 255)];
  /** @type {string[]} */
  const letters = [];
  let more = 256;
  for (let byte = 0; byte < 256; byte++) letters[byte] = String.fromCodePoint(plain.includes(byte) ? byte : more++);
  return letters;
})();

/** @param {number} first @param {number} last */
function range(first, last) {
  return Array.from({ length: last - first + 1 }, (_, i) => first + i);
}

export class Tokenizer {
  /** @param {Vocabulary} vocabulary */
  constructor(vocabulary) {
    this.given = vocabulary;
    this.ranks = new Map(vocabulary.merges.map((merge, i) => [merge, i]));
    this.added = [...vocabulary.added].sort((a, b) => b.content.length - a.content.length);
  }

  /** The tokens of a text, without begin, end and padding. @param {string} text @returns {Piece[]} */
  pieces(text) {
    return this.split(text).flatMap((part) => (typeof part === "string" ? this.words(part) : [part]));
  }

  /** Cut out the tokens that were added to the vocabulary. @param {string} text @returns {(string | Piece)[]} */
  split(text) {
    /** @type {(string | Piece)[]} */
    let parts = [text];
    for (const token of this.added) {
      const shown = token.special ? token.content : token.content.toLowerCase();
      const escaped = shown.replace(/[.*+?^${}()|[\]\\]/g, "\\$&");
      const pattern = new RegExp(token.single_word ? `(?<![\\p{L}\\p{N}_])${escaped}(?![\\p{L}\\p{N}_])` : escaped, "gu");
      /** @type {(part: string | Piece) => (string | Piece)[]} */
      const cut = (part) => {
        if (typeof part !== "string") return [part];
        const clean = token.special ? part : normalised(part);
        const between = clean.split(pattern);
        return between.flatMap((one, i) => (i ? [{ id: token.id, text: token.content, last: true }, one] : [one]));
      };
      parts = parts.flatMap(cut);
    }
    return parts;
  }

  /** @param {string} text @returns {Piece[]} */
  words(text) {
    return (normalised(text).match(WORD) ?? []).flatMap((word) => this.pairs(word));
  }

  /** Merge the pairs of a word, the most frequent first. @param {string} word @returns {Piece[]} */
  pairs(word) {
    let parts = [...new TextEncoder().encode(word)].map((byte) => LETTERS[byte]);
    parts[parts.length - 1] += "</w>";
    for (;;) {
      let best = -1;
      let rank = Infinity;
      for (let i = 0; i + 1 < parts.length; i++) {
        const found = this.ranks.get(`${parts[i]} ${parts[i + 1]}`) ?? Infinity;
        if (found < rank) [best, rank] = [i, found];
      }
      if (best < 0) break;
      parts.splice(best, 2, parts[best] + parts[best + 1]);
    }
    return parts.map((part) => ({
      id: this.given.vocabulary[part] ?? this.given.unknown,
      text: part.replace("</w>", ""),
      last: part.endsWith("</w>"),
    }));
  }

  /** Token ids of a text, padded; what does not fit is cut off. @param {string} text @returns {Int32Array} */
  encode(text) {
    const { length, begin, end, pad } = this.given;
    const ids = this.pieces(text).slice(0, length - 2).map((piece) => piece.id);
    const all = [begin, ...ids, end];
    return Int32Array.from({ length }, (_, i) => all[i] ?? pad);
  }
}

/** @param {string} text */
function normalised(text) {
  return text.normalize("NFC").replace(/\s+/g, " ").toLowerCase();
}
