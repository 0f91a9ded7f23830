/* Sorts and filters the table of claims. The table is complete without it; the state lives in the address, as in
   claims.html?verdict=held&chapter=1, so that a view can be linked to. No dependency, no request. */
(() => {
  "use strict";
  const table = document.querySelector("table.atlas-claims");
  if (!table || table.dataset.ready) return; // some themes load every script twice
  table.dataset.ready = "yes";

  const VERDICTS = ["held", "partly", "not here", "planned"];
  const SORTS = ["concept", "claim", "source", "verdict"]; // the columns, as the address names them
  const text = (node) => (node ? node.textContent.trim() : "");
  const rows = [...table.tBodies[0].rows].map((row, order) => ({
    row,
    words: text(row).toLowerCase(),
    verdict: text(row.querySelector(".atlas-verdict")),
    chapter: text(row.querySelector(".atlas-chapter")).replace(/\D/g, ""),
    keys: [
      order, // concepts in the book's order
      text(row.cells[1]).replace(/^\W+/, "").toLowerCase(),
      text(row.cells[2]).replace(/^\W+/, "").toLowerCase(),
      VERDICTS.indexOf(text(row.querySelector(".atlas-verdict"))),
    ],
  }));

  const element = (tag, attributes = {}, content = "") => {
    const node = document.createElement(tag);
    for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
    node.textContent = content;
    return node;
  };
  const labelled = (name, control) => {
    const label = element("label", {}, name);
    label.append(control);
    return label;
  };
  const select = (name, choices) => {
    const node = element("select", { name });
    node.append(...choices.map(([value, shown]) => element("option", { value }, shown)));
    return node;
  };

  const query = element("input", { type: "search", name: "q", autocomplete: "off" });
  const verdict = select("verdict", [["", "all"], ...VERDICTS.map((name) => [name, name])]);
  const numbers = [...new Set(rows.map((entry) => entry.chapter))];
  const chapter = select("chapter", [["", "all"], ...numbers.map((number) => [number, `chapter ${number}`])]);
  const reset = element("button", { type: "button" }, "Show all");
  const status = element("p", { class: "atlas-claims-status", role: "status", "aria-live": "polite" });
  const form = element("form", { class: "atlas-claims-controls", role: "search", "aria-label": "Claims" });
  form.append(labelled("Words", query), labelled("Verdict", verdict), labelled("Chapter", chapter), reset);
  const place = table.closest(".pst-scrollable-table-container") || table;
  place.before(form, status);

  const headers = [...table.tHead.rows[0].cells];
  let sort = 0;
  let descending = false;
  headers.forEach((cell, column) => {
    const button = element("button", { type: "button" }, text(cell));
    cell.setAttribute("scope", "col");
    cell.replaceChildren(button);
    button.addEventListener("click", () => {
      descending = sort === column && !descending;
      sort = column;
      show();
    });
  });

  const compare = (a, b) => {
    const [x, y] = [a.keys[sort], b.keys[sort]];
    const difference = typeof x === "number" ? x - y : x.localeCompare(y);
    return (descending ? -difference : difference) || a.keys[0] - b.keys[0];
  };
  const show = ({ keep = true } = {}) => {
    const wanted = query.value.toLowerCase().split(/\s+/).filter(Boolean);
    let count = 0;
    for (const entry of rows) {
      const seen =
        wanted.every((word) => entry.words.includes(word)) &&
        (!verdict.value || entry.verdict === verdict.value) &&
        (!chapter.value || entry.chapter === chapter.value);
      entry.row.hidden = !seen;
      count += seen;
    }
    table.tBodies[0].append(...[...rows].sort(compare).map((entry) => entry.row));
    headers.forEach((cell, column) => {
      if (column === sort) cell.setAttribute("aria-sort", descending ? "descending" : "ascending");
      else cell.removeAttribute("aria-sort");
    });
    status.textContent = count ? `${count} of ${rows.length} claims shown` : "No claim fits. Show all, or use fewer words.";
    if (!keep) return;
    const state = new URLSearchParams();
    for (const control of [query, verdict, chapter]) if (control.value) state.set(control.name, control.value);
    if (sort || descending) state.set("sort", SORTS[sort]);
    if (descending) state.set("order", "descending");
    const search = String(state);
    history.replaceState(null, "", location.pathname + (search ? `?${search}` : "") + location.hash);
  };

  const read = () => {
    const state = new URLSearchParams(location.search);
    query.value = state.get("q") || "";
    for (const control of [verdict, chapter]) {
      // an unknown choice shows everything
      control.value = state.get(control.name) || "";
      if (control.selectedIndex < 0) control.value = "";
    }
    sort = Math.max(0, SORTS.indexOf(state.get("sort")));
    descending = state.get("order") === "descending";
    show({ keep: false });
  };
  const anchor = () => {
    try {
      return decodeURIComponent(location.hash.slice(1));
    } catch {
      return location.hash.slice(1); // a stray % is no code
    }
  };
  const reveal = () => {
    const target = location.hash && document.getElementById(anchor());
    const row = target && target.closest("tr");
    if (!row || !table.contains(row)) return;
    if (row.hidden) clear();
    target.scrollIntoView();
  };
  const clear = () => {
    form.reset();
    sort = 0;
    descending = false;
    show();
  };

  form.addEventListener("submit", (event) => event.preventDefault());
  form.addEventListener("input", () => show());
  reset.addEventListener("click", () => {
    clear();
    query.focus();
  });
  window.addEventListener("hashchange", reveal);
  window.addEventListener("pageshow", (event) => event.persisted && read());
  read();
  reveal();
})();
