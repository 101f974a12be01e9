// @ts-check
/** Words offered as one types: a combobox with a list, as the ARIA Authoring Practices describe it. */

const MOST = 8;

/**
 * @param {HTMLInputElement} input @param {HTMLElement} list @param {{word: string, kind: string}[]} words
 */
export function suggest(input, list, words) {
  let chosen = -1;

  /** Start and text of the word that is being typed. @returns {[number, string]} */
  const typed = () => {
    const before = input.value.slice(0, input.selectionStart ?? input.value.length);
    const start = before.search(/[^\s,]*$/);
    return [start, before.slice(start).toLowerCase()];
  };

  const close = () => {
    list.hidden = true;
    list.replaceChildren();
    chosen = -1;
    input.setAttribute("aria-expanded", "false");
    input.removeAttribute("aria-activedescendant");
  };

  const offer = () => {
    const [, fragment] = typed();
    const found = fragment ? words.filter(({ word }) => word.startsWith(fragment) && word !== fragment).slice(0, MOST) : [];
    close();
    if (!found.length) return;
    found.forEach(({ word, kind }, number) => {
      const option = document.createElement("li");
      option.id = `suggestion-${number}`;
      option.role = "option";
      option.ariaSelected = "false";
      option.dataset.word = word;
      const about = document.createElement("span");
      about.className = "kind";
      about.textContent = kind;
      option.append(word, " ", about);
      option.addEventListener("pointerdown", (event) => {
        event.preventDefault(); // the line of text keeps the focus
        take(word);
      });
      list.append(option);
    });
    list.hidden = false;
    input.setAttribute("aria-expanded", "true");
  };

  /** @param {string} word */
  const take = (word) => {
    const [start, fragment] = typed();
    const after = input.value.slice(start + fragment.length);
    input.value = `${input.value.slice(0, start)}${word}${after.startsWith(" ") ? "" : " "}${after}`;
    input.setSelectionRange(start + word.length + 1, start + word.length + 1);
    close();
  };

  /** @param {number} by */
  const move = (by) => {
    const options = /** @type {HTMLElement[]} */ ([...list.children]);
    chosen = (chosen + by + options.length + (chosen < 0 && by < 0 ? 1 : 0)) % options.length;
    options.forEach((option, number) => (option.ariaSelected = String(number === chosen)));
    input.setAttribute("aria-activedescendant", options[chosen].id);
    options[chosen].scrollIntoView({ block: "nearest" });
  };

  input.addEventListener("input", offer);
  input.addEventListener("blur", close);
  input.addEventListener("keydown", (event) => {
    if (list.hidden) return;
    if (event.key === "ArrowDown") move(1);
    else if (event.key === "ArrowUp") move(-1);
    else if (event.key === "Escape") close();
    else if ((event.key === "Enter" && chosen >= 0) || (event.key === "Tab" && chosen >= 0))
      take(/** @type {HTMLElement} */ (list.children[chosen]).dataset.word ?? "");
    else return;
    if (event.key !== "Tab") event.preventDefault();
    event.stopImmediatePropagation();
  });
}
