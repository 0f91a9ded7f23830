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
