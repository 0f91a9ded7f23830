/* The concept map of the front page: lights what a concept rests on and what builds on it, filters, and finds the path
   to a concept. Reads the JSON beside the drawing; drawing and list are in the page already and work without this. */
(() => {
  "use strict";
  const root = document.querySelector(".atlas-map");
  if (!root || root.dataset.ready) return; // some themes load every script twice
  root.dataset.ready = "true";

  const data = JSON.parse(root.querySelector("script").textContent);
  const inside = root.querySelector(".atlas-map-inside");
  const svg = root.querySelector(".atlas-map-drawing");
  const status = root.querySelector(".atlas-map-status");
  const bar = root.querySelector(".atlas-map-bar");
  const filter = root.querySelector("#atlas-map-filter");
  const select = root.querySelector("#atlas-map-target");
  const panel = root.querySelector(".atlas-map-path");
  const KNOWN = "llm-atlas-known";

  const concepts = new Map(data.concepts.map((concept) => [concept.id, concept]));
  const place = new Map(data.concepts.map((concept, index) => [concept.id, index]));
  const byPlace = (ids) => [...ids].sort((a, b) => place.get(a) - place.get(b));
  const users = new Map(data.concepts.map(({ id }) => [id, []]));
  for (const { id, needs } of data.concepts) for (const need of needs) users.get(need).push(id);
  const nodes = new Map([...svg.querySelectorAll(".node")].map((node) => [node.dataset.id, node]));
  const entries = new Map([...root.querySelectorAll(".atlas-map-list li")].map((item) => [item.dataset.id, item]));
  const edges = [...svg.querySelectorAll(".edges path")];

  /* All that is reached from a concept by `step`, without itself; what is in `stop` is reached, not passed. */
  const reach = (start, step, stop = new Set()) => {
    const found = new Set();
    const open = [start];
    while (open.length) {
      for (const next of step(open.pop())) {
        if (found.has(next)) continue;
        found.add(next);
        if (!stop.has(next)) open.push(next);
      }
    }
    return found;
  };
  const needsOf = (id) => concepts.get(id).needs;
  const usersOf = (id) => users.get(id);

  const plural = (count, word) => `${count} ${word}${count === 1 ? "" : "s"}`;
  const enumerate = (ids) => {
    const names = ids.map((id) => concepts.get(id).name);
    return names.length < 2 ? names.join("") : `${names.slice(0, -1).join(", ")} and ${names.at(-1)}`;
  };

  // ---- state: what is pointed at, what is typed, where a path leads, what the reader knows

  let pointed = "";
  let target = "";
  let missing = ""; // what the address asks for, where no concept is called so
  let matches = null; // best first; null while nothing is typed
  const known = new Set();
  try {
    for (const id of JSON.parse(localStorage.getItem(KNOWN) || "[]")) if (concepts.has(id)) known.add(id);
  } catch {
    // storage is off, or holds something else: nothing is known
  }
  const remember = () => {
    try {
      localStorage.setItem(KNOWN, JSON.stringify(byPlace(known)));
    } catch {
      // kept until the page is left
    }
  };

  const pathTo = (id) => {
    const stop = new Set(known);
    stop.delete(id);
    const found = reach(id, needsOf, stop);
    const read = [...byPlace([...found].filter((other) => !stop.has(other))), id];
    // also what is known below another known one: its tick is never out of reach
    const all = reach(id, needsOf);
    const skipped = byPlace([...all].filter((other) => stop.has(other)));
    return { read, skipped, below: all.size + 1 - read.length - skipped.length };
  };

  // ---- light

  const STATES = ["self", "before", "after", "direct", "ahead", "match", "onpath"];
  const clear = () => {
    for (const item of [...nodes.values(), ...edges, ...entries.values()]) item.classList.remove(...STATES);
  };
  const light = () => {
    clear();
    if (pointed) lightConcept(pointed);
    else if (matches) for (const id of matches) nodes.get(id).classList.add("match");
    else if (target) lightPath();
    svg.classList.toggle("lit", Boolean(pointed || matches || target));
    if (target) for (const id of pathTo(target).read) entries.get(id).classList.add("onpath");
  };

  const lightConcept = (id) => {
    const { needs, previews } = concepts.get(id);
    const before = reach(id, needsOf);
    const after = reach(id, usersOf);
    for (const other of before) nodes.get(other).classList.add("before");
    for (const other of after) nodes.get(other).classList.add("after");
    for (const other of needs) nodes.get(other).classList.add("direct");
    for (const other of users.get(id)) nodes.get(other).classList.add("direct");
    for (const other of previews) if (!after.has(other)) nodes.get(other).classList.add("ahead");
    nodes.get(id).classList.add("self");
    for (const edge of edges) {
      const { from, to } = edge.dataset;
      if (edge.classList.contains("preview")) {
        if (from === id) edge.classList.add("ahead");
        continue;
      }
      if (to === id || before.has(to)) edge.classList.add("before");
      else if (from === id || after.has(from)) edge.classList.add("after");
      if (to === id || from === id) edge.classList.add("direct");
    }
  };

  const lightPath = () => {
    const { read } = pathTo(target);
    const on = new Set(read);
    read.forEach((id, index) => {
      const node = nodes.get(id);
      node.classList.add(id === target ? "self" : "before", "onpath");
      node.querySelector(".step").textContent = index + 1;
    });
    for (const edge of edges) {
      const { from, to } = edge.dataset;
      if (edge.classList.contains("need") && on.has(from) && on.has(to)) edge.classList.add("before", "onpath");
    }
  };

  // ---- say

  const sentence = (id) => {
    const { name, needs, previews } = concepts.get(id);
    const before = reach(id, needsOf).size;
    const after = reach(id, usersOf).size;
    const rests = before
      ? `${name}: rests on ${plural(before, "concept")}, directly on ${enumerate(needs)}`
      : `${name}: rests on no other concept`;
    const builds = after ? `${after} build${after === 1 ? "s" : ""} on it` : "none builds on it";
    const ahead = previews.length ? ` Looks ahead to ${enumerate(previews)}.` : "";
    return `${rests}; ${builds}.${ahead}`;
  };
  const andBelow = ({ skipped, below }) =>
    below ? `, and ${below} that only ${skipped.length === 1 ? "it needs" : "they need"}` : "";
  const say = () => {
    let text = "";
    if (pointed) text = sentence(pointed);
    else if (matches) {
      text = matches.length
        ? `${plural(matches.length, "concept")} ${matches.length === 1 ? "matches" : "match"}. ` +
          `Enter opens ${concepts.get(matches[0]).name}.`
        : "No concept matches. Escape clears the box.";
    } else if (target) {
      const path = pathTo(target);
      const left = path.skipped.length ? `; left out: ${path.skipped.length} that you know${andBelow(path)}` : "";
      text = `The path to ${concepts.get(target).name} has ${plural(path.read.length, "concept")}${left}.`;
    } else if (missing) text = `No concept is called '${missing}'.`;
    if (status.textContent !== text) status.textContent = text;
  };
  const show = () => {
    light();
    say();
  };

  const point = (id) => {
    if (id === pointed) return;
    pointed = id;
    show();
  };
  const at = (event) => event.target.closest?.(".node")?.dataset.id || "";
  svg.addEventListener("pointerover", (event) => {
    if (event.pointerType !== "touch") point(at(event));
  });
  svg.addEventListener("pointerleave", () => point(focused()));
  // listened for around the drawing: an svg element that hears of focus itself becomes a stop for Tab
  inside.addEventListener("focusin", (event) => {
    if (svg.contains(event.target)) point(at(event));
  });
  inside.addEventListener("focusout", (event) => {
    if (svg.contains(event.target) && !svg.contains(event.relatedTarget)) point("");
  });
  const focused = () => (svg.contains(document.activeElement) ? at({ target: document.activeElement }) : "");

  // ---- keys: one stop for Tab, arrows between neighbours

  const stops = [...svg.querySelectorAll("a")].map((link) => {
    const [x, y, height] = ["x", "y", "height"].map((name) => Number(link.querySelector("rect").getAttribute(name)));
    // a title begins a little left of its nodes: both round to one column
    return { link, column: Math.round(x / 100), middle: y + height / 2 };
  });
  const columns = [...new Set(stops.map(({ column }) => column))].sort((a, b) => a - b);
  const inColumn = (column) => stops.filter((stop) => stop.column === column).sort((a, b) => a.middle - b.middle);
  const enter = (stop) => {
    for (const { link } of stops) link.setAttribute("tabindex", link === stop.link ? "0" : "-1");
  };
  enter(stops.find(({ link }) => link.classList.contains("node")));
  inside.addEventListener("focusin", (event) => {
    const stop = stops.find(({ link }) => link === event.target);
    if (!stop) return;
    enter(stop);
    // not below what sticks to the top
    const { top, bottom } = stop.link.getBoundingClientRect();
    const covered = Math.max(...[bar, status].map((one) => one.getBoundingClientRect().bottom)) + 6;
    const by = top < covered ? top - covered : Math.max(0, bottom - innerHeight + 6);
    if (by) scrollBy({ top: by, behavior: "instant" });
  });
  svg.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    const here = stops.find(({ link }) => link === document.activeElement);
    if (!here) return;
    const column = inColumn(here.column);
    const row = column.indexOf(here);
    const beside = (by) => {
      const next = columns[columns.indexOf(here.column) + by];
      if (next === undefined) return undefined;
      const away = (stop) => Math.abs(stop.middle - here.middle);
      return inColumn(next).reduce((best, stop) => (away(stop) < away(best) ? stop : best));
    };
    const moves = {
      ArrowUp: () => column[row - 1],
      ArrowDown: () => column[row + 1],
      ArrowLeft: () => beside(-1),
      ArrowRight: () => beside(1),
      Home: () => column[0],
      End: () => column.at(-1),
    };
    if (event.key === "Escape") point("");
    if (!Object.hasOwn(moves, event.key)) return;
    event.preventDefault();
    moves[event.key]()?.link.focus({ preventScroll: true });
  });

  // ---- filter

  const plain = (text) =>
    text
      .normalize("NFKD")
      .replace(/[\u0300-\u036f]/g, "")
      .toLowerCase();
  const words = (text) => plain(text).split(/[^\p{L}\p{N}]+/u);
  const searched = data.concepts.map((concept) => ({
    id: concept.id,
    names: [concept.name, ...concept.aliases, concept.id].map(plain),
    text: plain([concept.name, ...concept.aliases, concept.symbol, data.chapters[concept.chapter]].join(" \n ")),
    words: words(`${concept.name} ${concept.aliases.join(" ")} chapter table ${data.chapters[concept.chapter]}`),
    parts: words(concept.symbol),
    chapter: String(concept.chapter),
  }));
  /* A short term is an abbreviation or the beginning of a word, a longer one may stand anywhere; a number is also a
     chapter's. */
  const fits = (entry, term) => {
    if (/^\d+$/.test(term)) return entry.chapter === term || entry.words.includes(term);
    if (term.length < 4) return [...entry.words, ...entry.parts].some((word) => word.startsWith(term));
    return entry.text.includes(term) || entry.words.some((word) => word.startsWith(term));
  };
  const rank = (entry, query) => {
    if (entry.names.includes(query)) return 0;
    if (entry.names.some((name) => words(name).includes(query))) return 1;
    if (entry.names.some((name) => name.startsWith(query))) return 2;
    return entry.names.some((name) => name.includes(query)) ? 3 : 4;
  };
  const find = (typed) => {
    const query = plain(typed).trim();
    if (!query) return null;
    const terms = query.split(/\s+/);
    return searched
      .filter((entry) => terms.every((term) => fits(entry, term)))
      .map((entry) => [rank(entry, query), entry.id])
      .sort(([a, one], [b, other]) => a - b || place.get(one) - place.get(other))
      .map(([, id]) => id);
  };

  const folds = [...root.querySelectorAll(".atlas-map-list details")];
  let open = null; // what was unfolded before something was typed
  const narrow = () => {
    matches = find(filter.value);
    if (matches && !open) open = folds.map((fold) => fold.open);
    for (const [id, entry] of entries) entry.hidden = Boolean(matches) && !matches.includes(id);
    folds.forEach((fold, index) => {
      const any = !matches || Boolean(fold.querySelector("li:not([hidden])"));
      fold.hidden = !any;
      if (matches) fold.open = any;
      else if (open) fold.open = open[index];
    });
    if (!matches) open = null;
    show();
  };
  filter.addEventListener("input", narrow);
  filter.addEventListener("keydown", (event) => {
    if (event.key === "Enter" && !event.isComposing && matches?.length) {
      event.preventDefault();
      location.href = concepts.get(matches[0]).href;
    } else if (event.key === "Escape" && filter.value) {
      event.preventDefault();
      filter.value = "";
      narrow();
    }
  });

  // ---- path

  const make = (tag, attributes = {}, ...children) => {
    const node = document.createElement(tag);
    for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
    node.append(...children);
    return node;
  };

  const groups = new Map();
  for (const { id, name, chapter } of data.concepts) {
    if (!groups.has(chapter)) {
      groups.set(chapter, make("optgroup", { label: `${chapter}. ${data.chapters[chapter]}` }));
    }
    groups.get(chapter).append(make("option", { value: id }, name));
  }
  select.append(...groups.values());

  const tick = (id, words) => {
    const box = make("input", { type: "checkbox", "data-id": id, "aria-label": `I know ${concepts.get(id).name}` });
    box.checked = known.has(id);
    return make("label", {}, box, words);
  };
  const draw = () => {
    panel.hidden = !target;
    select.value = target;
    if (!target) {
      panel.replaceChildren();
      return;
    }
    const path = pathTo(target);
    const { read, skipped } = path;
    const written = read.filter((id) => concepts.get(id).state !== "planned").length;
    const head = make("div", { class: "atlas-map-path-head" });
    head.append(
      make(
        "p",
        {},
        make("strong", {}, concepts.get(target).name),
        `: ${plural(read.length, "concept")} to read in this order, ${written} written`,
      ),
      make("button", { type: "button" }, "Clear the path"),
    );
    const list = make("ol");
    read.forEach((id, index) => {
      const { name, href, chapter, state } = concepts.get(id);
      const mark = state === "planned" ? "\u25cb" : state === "written" ? "\u25cf" : "\u25d0";
      const item = make(
        "li",
        id === target ? { class: "last", "data-id": id } : { "data-id": id },
        make("b", {}, String(index + 1)),
        make("span", {}, make("a", { href }, name), make("small", {}, `chapter ${chapter}, ${mark}\u00a0${state}`)),
      );
      if (id !== target) item.append(tick(id, "I know it"));
      list.append(item);
    });
    panel.replaceChildren(head, list);
    if (skipped.length) {
      const rest = make("ul", { "aria-label": "Left out as known" }, make("li", {}, "You know:"));
      for (const id of skipped) rest.append(make("li", {}, tick(id, concepts.get(id).name)));
      if (path.below) rest.append(make("li", {}, andBelow(path).slice(2)));
      panel.append(rest);
    }
  };
  const go = (id, unknown = "") => {
    target = id;
    missing = unknown;
    draw();
    show();
  };

  panel.addEventListener("change", ({ target: box }) => {
    const { id } = box.dataset;
    if (box.checked) known.add(id);
    else known.delete(id);
    remember();
    go(target);
    // its row has moved: the focus goes with it; it has none if only what is known needs it
    (panel.querySelector(`input[data-id="${id}"]`) || panel.querySelector("ul input, button")).focus();
  });
  panel.addEventListener("click", (event) => {
    if (!event.target.closest("button")) return;
    keep("");
    select.focus();
  });

  /* The address keeps the target, so that a path can be shared and the back button returns to the last one. */
  const asked = () => {
    let name = /^#path=(.*)$/.exec(location.hash)?.[1] || "";
    try {
      name = decodeURIComponent(name);
    } catch {
      // a bare % stays as it is
    }
    if (!name || concepts.has(name)) return [name, ""];
    const id = searched.find(({ names }) => names.includes(plain(name).trim()))?.id;
    return id ? [id, ""] : ["", name.length > 60 ? `${name.slice(0, 60)}\u2026` : name];
  };
  const keep = (id) => {
    history.pushState(null, "", id ? `#path=${id}` : location.pathname + location.search);
    go(id);
  };
  select.addEventListener("change", () => {
    keep(select.value);
    if (!target) return;
    // in the list, the chapters that hold the path are unfolded, also once a filter is cleared
    for (const id of pathTo(target).read) {
      const fold = entries.get(id).closest("details");
      fold.open = true;
      if (open) open[folds.indexOf(fold)] = true;
    }
  });
  window.addEventListener("popstate", () => {
    const [id, unknown] = asked();
    if (id === target && unknown === missing) return;
    go(id, unknown);
    if (target) panel.scrollIntoView({ block: "nearest" });
  });
  if (asked().some(Boolean)) {
    go(...asked());
    root.scrollIntoView();
  }

  // ---- map or list

  const views = [...root.querySelectorAll("[data-show]")].filter((node) => node.matches("button"));
  for (const button of views) {
    button.addEventListener("click", () => {
      inside.dataset.show = button.dataset.show;
      for (const other of views) other.setAttribute("aria-pressed", String(other === button));
    });
  }

  // a box that the browser has filled again, on the way back
  window.addEventListener("pageshow", () => {
    if (filter.value) narrow();
  });
})();
