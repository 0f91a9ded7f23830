/* What Sphinx's search asks for the score of each result. A concept typed whole comes first; then written concepts and
   titles that hold the query as a word; then planned concepts; Python objects after them, those of the book's own
   machinery last. A result that lies at a concept is titled with the concept's name in place of its page's title. */
var Scorer = {
  objNameMatch: 11,
  objPartialMatch: 6,
  objPrio: { 0: 15, 1: 5, 2: -5 },
  objPrioDefault: 0,
  title: 15,
  partialTitle: 7,
  term: 5,
  partialTerm: 2,
  // page#anchor -> [title, context], both html
  concepts: {} /* titles */,
  query: "",
  // lower case, with one space for all that is neither letter nor digit
  words: (text) => text.toLowerCase().replace(/[^\p{Letter}\p{Number}]+/gu, " ").trim(),
  // the query as whole words; a plural is the same word
  holds: (text) => {
    const [whole, query] = [` ${Scorer.words(text)} `, Scorer.words(Scorer.query)];
    return query !== "" && (whole.includes(` ${query} `) || whole.includes(` ${query}s `));
  },
  // an object's name is many words in one: LayerNorm is found by "layer", "norm" and "layernorm", not by "yern"
  begins: (text) => {
    const split = text.replace(/([\p{Ll}\p{N}])(\p{Lu})/gu, "$1 $2").replace(/(\p{Lu})(\p{Lu}\p{Ll})/gu, "$1 $2");
    const all = ` ${Scorer.words(text)} ${Scorer.words(split)}`;
    return Scorer.words(Scorer.query).split(" ").every((word) => all.includes(` ${word}`));
  },
  // Classes of results, best first; within one Sphinx's own score decides. A result below zero is left out.
  score: (result) => {
    const [page, title, anchor, description, score] = result;
    const place = page + anchor;
    let rank = 2;
    if (description !== null) {
      if (!Scorer.begins(`${title} ${description}`)) return -1;
      if (title.startsWith("llm_atlas.book.")) rank = 0;
    } else if (Object.hasOwn(Scorer.concepts, place)) {
      [result[1], result[3]] = Scorer.concepts[place];
      const written = !place.startsWith("chapters/tables#");
      rank = score >= 100 ? 6 : written ? (Scorer.holds(result[1]) ? 5 : 4) : 3;
    } else if (score >= 100) {
      rank = 6;
    } else if (page.startsWith("chapters/api/")) {
      rank = 1;
    } else if (Scorer.holds(title.split(" > ").pop())) {
      rank = 5;
    }
    return 1000 * rank + score;
  },
  // Concepts with the query, or words that begin like it, in their names: Sphinx finds an entry only by half of its
  // letters or more.
  named: () => {
    const { docnames, filenames, titles } = Search._index;
    const found = Scorer.words(Scorer.query).length > 2 ? Scorer.begins : Scorer.holds;
    return Object.entries(Scorer.concepts).flatMap(([place, [title]]) => {
      const [page, anchor] = place.split("#");
      const file = docnames.indexOf(page);
      const score = Math.min(Math.round((100 * Scorer.query.length) / title.length), 99);
      return file >= 0 && found(title) ? [[page, titles[file], `#${anchor}`, null, score, filenames[file]]] : [];
    });
  },
};

// Sphinx's own script may run before or after the page is ready: called from both sides, it acts once.
let extended = false;
const extend = () => {
  if (extended || typeof Search === "undefined") return;
  extended = true;
  const [perform, terms, whole] = [Search._performSearch, Search.performTermsSearch, Search.htmlToText];
  Search._performSearch = (query, ...rest) => {
    Scorer.query = query.trim();
    return perform(query, ...rest).filter((result) => result[4] >= 0);
  };
  Search.performTermsSearch = (...given) => [...terms(...given), ...Scorer.named()];
  // The summary of a result is of the page's text; Sphinx would begin with the buttons above it.
  Search.htmlToText = (text, anchor) => {
    const article = new DOMParser().parseFromString(text, "text/html").querySelector("article.bd-article");
    if (anchor || !article) return whole(text, anchor);
    article.querySelectorAll(".headerlink, script, style, nav").forEach((one) => one.remove());
    return article.textContent.replace(/\s+/g, " ");
  };
};
document.addEventListener("DOMContentLoaded", extend);

// The first that Sphinx calls for a query. A single letter ("top-p") would match, and be marked, in every word.
var splitQuery = (query) => {
  extend();
  const words = query.split(/[^\p{Letter}\p{Number}_\p{Emoji_Presentation}]+/gu).filter((word) => word);
  const long = words.filter((word) => word.length > 1);
  return long.length ? long : words;
};
