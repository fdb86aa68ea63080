// Weights of the search: a heading that the query names, then guides, then everything else; the changelog last.
var Scorer = {
  score: ([page, title, anchor, description, score, file, kind]) => {
    const heading = kind === "title" ? 20 : 0;
    const guide = /^(howto|tutorials)\/|^(quickstart|faq|coming_from)$/.test(page) ? 3 : 0;
    const last = /^(changelog|contributing)$/.test(page) ? 5 : 0;
    return score + heading + guide - last;
  },
  // Sphinx's own values follow; it has no way to keep them.
  objNameMatch: 11,
  objPartialMatch: 6,
  objPrio: { 0: 15, 1: 5, 2: -5 },
  objPrioDefault: 0,
  title: 15,
  partialTitle: 7,
  term: 5,
  partialTerm: 2,
};
