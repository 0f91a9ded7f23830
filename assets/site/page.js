/* What every page needs and the theme leaves out: whatever scrolls sideways can be reached, and scrolled, by keyboard. */
(() => {
  "use strict";
  if (window.atlasPage) return; // some themes load every script twice
  window.atlasPage = true;

  const WIDE = ".bd-article pre, .bd-article div.math, .bd-article mjx-container, .bd-article table, .bd-article div.cell_output > .text_html, .bd-article .pst-scrollable-table-container";
  const name = (node) => {
    if (node.matches("pre")) return node.closest(".cell_input") ? "Code" : "Text";
    if (node.matches(".math, mjx-container")) return "Formula";
    return "Table";
  };
  const mark = () => {
    for (const node of document.querySelectorAll(WIDE)) {
      const scrolls = node.scrollWidth > node.clientWidth && getComputedStyle(node).overflowX !== "visible";
      if (scrolls && !node.hasAttribute("tabindex")) {
        node.tabIndex = 0;
        node.dataset.atlasWide = "";
        if (!node.matches("table")) node.setAttribute("role", "group");
        node.setAttribute("aria-label", `${name(node)}, scrolls sideways`);
      } else if (!scrolls && "atlasWide" in node.dataset) {
        for (const attribute of ["tabindex", "role", "aria-label", "data-atlas-wide"]) node.removeAttribute(attribute);
      }
    }
  };
  let waiting = 0;
  const later = () => {
    clearTimeout(waiting);
    waiting = setTimeout(mark, 150);
  };
  addEventListener("resize", later);
  addEventListener("load", () => {
    mark();
    // formulas get their width later
    window.MathJax?.startup?.promise?.then(() => document.fonts.ready).then(mark);
  });
  // what is opened is measured then
  document.addEventListener("toggle", later, true);
  document.addEventListener("click", later);
})();
