/* What Sphinx's search asks for the score of each result. The scores are Sphinx's own; a result that lies at a
   concept is titled with the concept's name in place of its page's title. */
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
  score: (result) => {
    const place = result[0] + result[2];
    if (Object.hasOwn(Scorer.concepts, place)) {
      [result[1], result[3]] = Scorer.concepts[place];
    }
    return result[4];
  },
};

// A single letter ("top-p") would match, and be marked, in every word.
var splitQuery = (query) => {
  const words = query.split(/[^\p{Letter}\p{Number}_\p{Emoji_Presentation}]+/gu).filter((word) => word);
  const long = words.filter((word) => word.length > 1);
  return long.length ? long : words;
};

// The summary of a result is of the page's text; Sphinx would begin with the buttons above it.
document.addEventListener("DOMContentLoaded", () => {
  if (typeof Search === "undefined") return;
  const whole = Search.htmlToText;
  Search.htmlToText = (text, anchor) => {
    const article = new DOMParser().parseFromString(text, "text/html").querySelector("article.bd-article");
    if (anchor || !article) return whole(text, anchor);
    article.querySelectorAll(".headerlink, script, style, nav").forEach((one) => one.remove());
    return article.textContent.replace(/\s+/g, " ");
  };
});
