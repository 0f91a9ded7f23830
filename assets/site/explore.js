/* Draws the explorables of llm_atlas.book.explore: reads the JSON of each figure, makes native controls, redraws as SVG
   at the figure's real width, so that text keeps its size on a phone. No dependency, no request. */
(() => {
  "use strict";
  if (window.atlasExplore) return; // some themes load every script twice
  window.atlasExplore = true;

  const NS = "http://www.w3.org/2000/svg";
  const COLORS = 7;
  let count = 0;

  const html = (tag, attributes = {}, text = "") => {
    const node = document.createElement(tag);
    for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
    if (text) node.textContent = text;
    return node;
  };
  const svg = (parent, tag, attributes = {}, text = "") => {
    const node = document.createElementNS(NS, tag);
    for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
    if (text !== "") node.textContent = text;
    parent.append(node);
    return node;
  };

  const number = (value) => {
    if (value === null || value === undefined) return "no value";
    if (value === 0) return "0";
    const size = Math.abs(value);
    const text = size < 1e-3 || size >= 1e6 ? value.toExponential(2) : String(Number(value.toPrecision(4)));
    return text.replace("-", "\u2212");
  };

  const measure = (() => {
    const context = document.createElement("canvas").getContext("2d");
    return (text, size = 12.5) => {
      context.font = `${size}px system-ui, sans-serif`;
      return context.measureText(text).width;
    };
  })();

  /* Axis: data to pixels, and round ticks in between. */
  const scale = (low, high, from, to, log) => {
    const f = log ? Math.log : (v) => v;
    const [a, b] = [f(low), f(high)];
    return (v) => from + ((f(v) - a) / (b - a || 1)) * (to - from);
  };
  const ticks = (low, high, wanted, log) => {
    if (log) {
      const first = Math.ceil(Math.log10(low) - 1e-9), last = Math.floor(Math.log10(high) + 1e-9);
      if (last - first >= 1) {
        const every = Math.max(1, Math.ceil((last - first + 1) / wanted));
        const found = [];
        for (let p = first; p <= last; p += every) found.push(10 ** p);
        return found;
      }
    }
    const rough = (high - low) / wanted;
    const power = 10 ** Math.floor(Math.log10(rough));
    const step = [1, 2, 2.5, 5, 10].map((m) => m * power).find((s) => s >= rough * 0.999);
    const found = [];
    for (let v = Math.ceil(low / step - 1e-9) * step; v <= high + step * 1e-9; v += step) found.push(Number(v.toPrecision(12)));
    return found;
  };

  const spread = (places, gap, low, high) => {
    const order = places.map((_, i) => i).sort((a, b) => places[a] - places[b]);
    const put = places.slice();
    order.forEach((index, rank) => {
      if (rank > 0) put[index] = Math.max(put[index], put[order[rank - 1]] + gap);
    });
    const over = order.length ? put[order[order.length - 1]] - high : 0;
    if (over > 0) {
      let limit = high;
      for (const index of order.slice().reverse()) {
        put[index] = Math.min(put[index], limit);
        limit = put[index] - gap;
      }
    }
    return put.map((p) => Math.max(p, low));
  };

  const canvas = (stage, width, height) =>
    svg(stage, "svg", { viewBox: `0 0 ${width} ${height}`, width, height, "aria-hidden": "true" });

  /* Axes common to lines and bars. Returns the plotting box. */
  const frameAxes = (root, box, d, y, yTicks) => {
    for (const v of yTicks) {
      const at = y(v);
      svg(root, "line", { class: "ae-grid", x1: box.left, x2: box.right, y1: at, y2: at });
      svg(root, "text", { x: box.left - 7, y: at + 4, "text-anchor": "end" }, number(v));
    }
    if (d.yLabel) svg(root, "text", { class: "ae-name", x: 0, y: 12 }, d.yLabel);
    if (d.xLabel) {
      svg(root, "text", { class: "ae-name", x: (box.left + box.right) / 2, y: box.height - 3, "text-anchor": "middle" }, d.xLabel);
    }
  };

  /* Each painter fills `stage` and returns {cells, show(cell)}: how many steps the arrow keys have along x and y, how to
     find the cell under a pointer, and the text for one cell. */
  const paint = {
    lines(stage, d, width) {
      const height = Math.round(Math.min(Math.max(width * 0.55, 230), 380));
      const many = d.lines.length > 1;
      const names = many ? Math.max(...d.lines.map((l) => measure(l.label))) + 10 : 0;
      const direct = many && names < width * 0.3 && d.lines.length * 15 < height - 60;
      if (many && !direct) {
        const legend = html("div", { class: "atlas-explore-legend" });
        d.lines.forEach((l, i) => legend.append(html("span", { style: `--chip: var(--ae-${i % COLORS})` }, l.label)));
        stage.append(legend);
      }
      const [low, high] = d.range;
      const yTicks = ticks(low, high, 5, d.yLog);
      const box = {
        left: Math.max(...yTicks.map((v) => measure(number(v), 12)), 8) + 10,
        right: width - (direct ? names : 12),
        top: d.yLabel ? 26 : 10,
        bottom: height - (d.xLabel ? 40 : 22),
        height,
      };
      const root = canvas(stage, width, height);
      const finite = d.x.filter((v) => v !== null);
      let [x0, x1] = [Math.min(...finite), Math.max(...finite)];
      if (x0 === x1) [x0, x1] = d.xLog ? [x0 / 2, x1 * 2] : [x0 - 1, x1 + 1];
      const x = scale(x0, x1, box.left, box.right, d.xLog);
      const y = scale(low, high, box.bottom, box.top, d.yLog);
      frameAxes(root, box, d, y, yTicks);
      svg(root, "line", { class: "ae-axis", x1: box.left, x2: box.right, y1: box.bottom, y2: box.bottom });
      for (const v of ticks(x0, x1, Math.max(3, Math.floor((box.right - box.left) / 75)), d.xLog)) {
        svg(root, "line", { class: "ae-axis", x1: x(v), x2: x(v), y1: box.bottom, y2: box.bottom + 4 });
        svg(root, "text", { x: x(v), y: box.bottom + 17, "text-anchor": "middle" }, number(v));
      }
      const clip = `ae-clip-${++count}`;
      svg(svg(root, "clipPath", { id: clip }), "rect", {
        x: box.left - 3, y: box.top - 3, width: box.right - box.left + 6, height: box.bottom - box.top + 6,
      });
      const curves = svg(root, "g", { "clip-path": `url(#${clip})` });
      const ends = [];
      d.lines.forEach((line, i) => {
        const color = `var(--ae-${i % COLORS})`;
        let path = "", pen = "M", last = null;
        line.y.forEach((v, j) => {
          if (v === null || d.x[j] === null) { pen = "M"; return; }
          path += `${pen}${x(d.x[j]).toFixed(1)} ${y(v).toFixed(1)}`;
          pen = "L";
          last = [x(d.x[j]), y(v)];
        });
        svg(curves, "path", {
          d: path, fill: "none", "stroke-width": 2.25, "stroke-linejoin": "round", "stroke-linecap": "round", style: `stroke: ${color}`,
        });
        if (last) ends.push({ at: last, label: line.label, color });
      });
      if (direct) {
        const places = spread(ends.map((e) => e.at[1]), 15, box.top, box.bottom);
        ends.forEach((e, i) => svg(root, "text", {
          class: "ae-name", x: e.at[0] + 7, y: places[i] + 4, style: `fill: ${e.color}; font-weight: 600`,
        }, e.label));
      }
      const cursor = svg(root, "g");
      return {
        columns: d.x.length,
        rows: 1,
        find: (px) => {
          let best = 0;
          d.x.forEach((v, j) => { if (v !== null && Math.abs(x(v) - px) < Math.abs(x(d.x[best]) - px)) best = j; });
          return [best, 0];
        },
        show: (cell) => {
          cursor.replaceChildren();
          if (!cell) return "";
          const at = d.x[cell[0]];
          svg(cursor, "line", { class: "ae-cursor", x1: x(at), x2: x(at), y1: box.top, y2: box.bottom });
          d.lines.forEach((line, i) => {
            const v = line.y[cell[0]];
            if (v !== null && v >= Math.min(low, high) && v <= Math.max(low, high)) {
              svg(cursor, "circle", { cx: x(at), cy: y(v), r: 4, style: `fill: var(--ae-${i % COLORS}); stroke: var(--ae-page)` });
            }
          });
          const values = d.lines.map((l) => `${many ? `${l.label} ` : ""}${number(l.y[cell[0]])}`).join(", ");
          return `${d.xLabel || "x"} ${number(at)}: ${values}`;
        },
      };
    },

    bars(stage, d, width) {
      const n = d.labels.length;
      const longest = Math.max(...d.labels.map((t) => measure(t, 12)));
      return longest + 8 > (width - 50) / n ? paint.barsAcross(stage, d, width, longest) : paint.barsUp(stage, d, width);
    },

    barsUp(stage, d, width) {
      const height = Math.round(Math.min(Math.max(width * 0.5, 220), 340));
      const [low, high] = d.range;
      const yTicks = ticks(low, high, 5, false);
      const box = {
        left: Math.max(...yTicks.map((v) => measure(number(v), 12)), 8) + 10, right: width - 4,
        top: d.yLabel ? 26 : 10, bottom: height - (d.xLabel ? 40 : 22), height,
      };
      const root = canvas(stage, width, height);
      const y = scale(low, high, box.bottom, box.top, false);
      frameAxes(root, box, d, y, yTicks);
      const slot = (box.right - box.left) / d.labels.length;
      const zero = y(Math.min(Math.max(0, low), high));
      d.labels.forEach((label, i) => {
        const v = d.values[i];
        const left = box.left + i * slot;
        if (v !== null) {
          const top = y(Math.min(Math.max(v, low), high));
          svg(root, "rect", {
            x: left + slot * 0.14, width: slot * 0.72, y: Math.min(top, zero), height: Math.abs(top - zero), rx: 2,
            style: `fill: var(--ae-${v < 0 ? 1 : 0})`,
          });
        }
        svg(root, "text", { x: left + slot / 2, y: box.bottom + 16, "text-anchor": "middle" }, label);
      });
      svg(root, "line", { class: "ae-axis", x1: box.left, x2: box.right, y1: zero, y2: zero });
      const cursor = svg(root, "g");
      return {
        columns: d.labels.length,
        rows: 1,
        find: (px) => [Math.min(Math.max(Math.floor((px - box.left) / slot), 0), d.labels.length - 1), 0],
        show: (cell) => {
          cursor.replaceChildren();
          if (!cell) return "";
          svg(cursor, "rect", { class: "ae-box", x: box.left + cell[0] * slot + 1, y: box.top, width: slot - 2, height: box.bottom - box.top, rx: 3 });
          return `${d.labels[cell[0]]}: ${number(d.values[cell[0]])}`;
        },
      };
    },

    /* Long labels read better beside the bars than turned under them. */
    barsAcross(stage, d, width, longest) {
      const row = 24;
      const shown = Math.min(longest, width * 0.4);
      const top = d.yLabel ? 24 : 4;
      const height = top + d.labels.length * row + 22;
      const [low, high] = d.range;
      const root = canvas(stage, width, height);
      const box = { left: shown + 10, right: width - 14 };
      const x = scale(low, high, box.left, box.right, false);
      const bottom = top + d.labels.length * row;
      if (d.yLabel) svg(root, "text", { class: "ae-name", x: box.left, y: 13 }, d.yLabel);
      for (const v of ticks(low, high, Math.max(3, Math.floor((box.right - box.left) / 70)), false)) {
        svg(root, "line", { class: "ae-grid", x1: x(v), x2: x(v), y1: top, y2: bottom });
        svg(root, "text", { x: x(v), y: bottom + 16, "text-anchor": "middle" }, number(v));
      }
      const zero = x(Math.min(Math.max(0, low), high));
      d.labels.forEach((label, i) => {
        const v = d.values[i];
        let text = label;
        while (text.length > 2 && measure(text, 12) > shown) text = `${text.slice(0, -2)}\u2026`;
        svg(root, "text", { class: "ae-name", x: box.left - 7, y: top + i * row + 16, "text-anchor": "end" }, text);
        if (v === null) return;
        const end = x(Math.min(Math.max(v, low), high));
        svg(root, "rect", {
          x: Math.min(end, zero), width: Math.abs(end - zero), y: top + i * row + 4, height: row - 8, rx: 2,
          style: `fill: var(--ae-${v < 0 ? 1 : 0})`,
        });
      });
      svg(root, "line", { class: "ae-axis", x1: zero, x2: zero, y1: top, y2: bottom });
      const cursor = svg(root, "g");
      return {
        columns: 1,
        rows: d.labels.length,
        find: (px, py) => [0, Math.min(Math.max(Math.floor((py - top) / row), 0), d.labels.length - 1)],
        show: (cell) => {
          cursor.replaceChildren();
          if (!cell) return "";
          svg(cursor, "rect", { class: "ae-box", x: 1, y: top + cell[1] * row + 1, width: width - 2, height: row - 2, rx: 3 });
          return `${d.labels[cell[1]]}: ${number(d.values[cell[1]])}`;
        },
      };
    },

    heatmap(stage, d, width) {
      const columns = d.xTicks.length, rows = d.yTicks.length;
      const [low, high] = d.range;
      const tickY = Math.min(Math.max(...d.yTicks.map((t) => measure(t, 12))), width * 0.28);
      const left = tickY + 8 + (d.yLabel ? 18 : 0);
      let cell = (width - left - 2) / columns;
      // square where that fits, up to a comfortable size
      cell = Math.min(cell, 46);
      const tall = Math.min(cell, Math.max(440 / rows, 6));
      const widest = Math.max(...d.xTicks.map((t) => measure(t, 12)));
      // numbers stay level and are thinned out; words are turned
      const short = widest <= 28;
      const turned = !short && widest + 6 > cell;
      const top = 4;
      const below = (turned ? Math.min(widest, 90) * 0.83 + 16 : 20) + (d.xLabel ? 20 : 0);
      const height = Math.ceil(top + rows * tall + below);
      const root = canvas(stage, width, height);
      const shade = (v) => {
        if (low < 0 && high > 0) {
          const t = Math.min(Math.abs(v) / Math.max(-low, high), 1);
          return `rgba(var(--ae-${v < 0 ? "low" : "high"}), ${t.toFixed(3)})`;
        }
        return `rgba(var(--ae-high), ${Math.min(Math.max((v - low) / (high - low), 0), 1).toFixed(3)})`;
      };
      const gap = cell > 10 && tall > 10 ? 1 : 0;
      const masked = d.values.some((line) => line.includes(null));
      const hatch = masked ? paint.hatch(root) : "";
      d.values.forEach((line, r) => line.forEach((v, c) => {
        const place = { x: (left + c * cell).toFixed(2), y: (top + r * tall).toFixed(2), width: (cell - gap).toFixed(2), height: (tall - gap).toFixed(2) };
        if (v === null) svg(root, "rect", { ...place, class: "ae-blank", style: `fill: url(#${hatch})` });
        else svg(root, "rect", { ...place, style: `fill: ${shade(v)}` });
      }));
      svg(root, "rect", { x: left, y: top, width: columns * cell, height: rows * tall, fill: "none", style: "stroke: var(--ae-border)" });
      const cut = (text, room) => {
        let t = text;
        while (t.length > 2 && measure(t, 12) > room) t = `${t.slice(0, -2)}\u2026`;
        return t;
      };
      const everyX = Math.ceil((short ? widest + 8 : 15) / cell), everyY = Math.ceil(13 / tall);
      d.xTicks.forEach((t, c) => {
        if (c % everyX) return;
        const x = left + (c + 0.5) * cell, y = top + rows * tall + 14;
        const attributes = turned
          ? { x: x + 3, y: y - 3, "text-anchor": "end", transform: `rotate(-56 ${x + 3} ${y - 3})` }
          : { x, y, "text-anchor": "middle" };
        svg(root, "text", attributes, turned ? cut(t, 90) : t);
      });
      d.yTicks.forEach((t, r) => {
        if (r % everyY) return;
        svg(root, "text", { x: left - 6, y: top + (r + 0.5) * tall + 4, "text-anchor": "end" }, cut(t, tickY + 1));
      });
      if (d.xLabel) svg(root, "text", { class: "ae-name", x: left + (columns * cell) / 2, y: height - 3, "text-anchor": "middle" }, d.xLabel);
      if (d.yLabel) {
        const middle = top + (rows * tall) / 2;
        svg(root, "text", { class: "ae-name", x: 11, y: middle, "text-anchor": "middle", transform: `rotate(-90 11 ${middle})` }, d.yLabel);
      }
      const bar = paint.colorScale(low, high);
      if (masked) {
        const key = html("span", { class: "atlas-explore-masked" });
        const swatch = svg(key, "svg", { width: 20, height: 12, "aria-hidden": "true" });
        const size = { x: 0.5, y: 0.5, width: 19, height: 11 };
        // a pattern of its own: the one of the drawing is not found once that is redrawn
        svg(swatch, "rect", { ...size, class: "ae-blank", style: `fill: url(#${paint.hatch(swatch)}); stroke: var(--ae-border)` });
        key.append("masked");
        bar.append(key);
      }
      stage.append(bar);
      const cursor = svg(root, "g");
      const clamp = (v, n) => Math.min(Math.max(v, 0), n - 1);
      return {
        columns,
        rows,
        find: (px, py) => [clamp(Math.floor((px - left) / cell), columns), clamp(Math.floor((py - top) / tall), rows)],
        show: (at) => {
          cursor.replaceChildren();
          if (!at) return "";
          const [c, r] = at;
          svg(cursor, "rect", { class: "ae-box", x: left + c * cell - 1, y: top + r * tall - 1, width: cell + 1, height: tall + 1 });
          const value = d.values[r][c];
          return `${d.yLabel || "row"} ${d.yTicks[r]}, ${d.xLabel || "column"} ${d.xTicks[c]}: ${value === null ? "masked" : number(value)}`;
        },
      };
    },

    /* No weight looks like it: a colour of the scale, however pale, is even. Returns the id of the pattern. */
    hatch(root) {
      const id = `ae-hatch-${++count}`;
      const pattern = svg(svg(root, "defs"), "pattern", {
        id, width: 6, height: 6, patternUnits: "userSpaceOnUse", patternTransform: "rotate(45)",
      });
      svg(pattern, "rect", { class: "ae-hatch-ground", width: 6, height: 6 });
      svg(pattern, "line", { class: "ae-hatch", x1: 0.75, x2: 0.75, y1: 0, y2: 6 });
      return id;
    },

    colorScale(low, high, deepest = 1) {
      const bar = html("div", { class: "atlas-explore-scale" });
      const stops = low < 0 && high > 0
        ? `rgba(var(--ae-low), ${deepest}), transparent, rgba(var(--ae-high), ${deepest})`
        : `transparent, rgba(var(--ae-high), ${deepest})`;
      bar.append(html("span", {}, number(low)), html("i", { style: `background: linear-gradient(90deg, ${stops})` }), html("span", {}, number(high)));
      return bar;
    },

    tokens(stage, d) {
      const [low, high] = d.range;
      const line = html("div", { class: "atlas-explore-tokens" });
      const spans = d.tokens.map((token, i) => {
        const span = html("span", {}, token.replaceAll("\n", "\u21b5") || "\u2205");
        const v = d.values[i];
        if (v !== null) {
          const both = low < 0 && high > 0;
          const t = both ? Math.min(Math.abs(v) / Math.max(-low, high), 1) : Math.min(Math.max((v - low) / (high - low), 0), 1);
          // never so deep that the text loses its contrast
          span.style.background = `rgba(var(--ae-${both && v < 0 ? "low" : "high"}), calc(${t.toFixed(3)} * var(--ae-deepest)))`;
        }
        if (i === d.focus) span.classList.add("ae-focus");
        line.append(span);
        return span;
      });
      stage.append(line, paint.colorScale(low, high, "var(--ae-deepest)"));
      return {
        columns: spans.length,
        rows: 1,
        find: (px, py, target) => {
          const index = spans.indexOf(target);
          return index < 0 ? null : [index, 0];
        },
        show: (cell) => {
          spans.forEach((span, i) => span.classList.toggle("ae-at", Boolean(cell) && cell[0] === i));
          return cell ? `${d.tokens[cell[0]].trim() || "space"}: ${number(d.values[cell[0]])}` : "";
        },
      };
    },
  };

  const setUp = (figure) => {
    const source = figure.querySelector("script[type='application/json']");
    const body = figure.querySelector(".atlas-explore-body");
    if (!source || !body || body.childElementCount) return;
    const spec = JSON.parse(source.textContent);
    const id = `atlas-explore-${++count}`;
    const title = figure.querySelector(".atlas-explore-title");
    if (title) title.id = `${id}-title`;
    figure.setAttribute("role", "group");
    figure.setAttribute("aria-labelledby", `${id}-title`);

    const chosen = spec.controls.map((control) => control.default);
    const controls = html("div", { class: "atlas-explore-controls" });
    const stage = html("div", { class: "atlas-explore-drawing", role: "img", tabindex: "0", "aria-describedby": `${id}-note` });
    const note = html("p", { class: "atlas-explore-note", id: `${id}-note`, "aria-live": "polite" });
    body.append(controls, stage, note);

    let view = null, cell = null, drawnWidth = 0;
    const said = (v) => (v === true ? "yes" : v === false ? "no" : String(v));
    const settings = () => spec.controls.map((c, i) => `${c.label} ${said(c.values[chosen[i]])}`).join(", ");
    const frame = () => {
      let index = 0;
      spec.controls.forEach((control, i) => { index = index * control.values.length + chosen[i]; });
      return { ...spec.common, ...spec.frames[index] };
    };
    const tell = () => {
      const here = view.show(cell);
      const text = here || frame().note;
      note.textContent = text || "Point at or tap the drawing, or focus it and use the arrow keys, to read its values.";
      note.classList.toggle("atlas-explore-hint", !text);
    };
    const draw = () => {
      const width = Math.max(Math.round(stage.clientWidth || body.clientWidth || 640), 260);
      drawnWidth = width;
      stage.replaceChildren();
      view = paint[spec.kind](stage, frame(), width);
      stage.setAttribute("aria-label", `${spec.alt} (${settings()})`);
      if (cell && (cell[0] >= view.columns || cell[1] >= view.rows)) cell = null;
      tell();
    };

    spec.controls.forEach((control, i) => {
      const holder = html("div", { class: "atlas-explore-control" });
      const input = `${id}-${i}`;
      holder.append(html("label", { for: input }, control.label));
      const last = control.values.length - 1;
      if (control.kind === "slider") {
        const value = html("output", { for: input }, String(control.values[chosen[i]]));
        const row = html("div", { class: "atlas-explore-row" });
        const slider = html("input", { type: "range", id: input, min: 0, max: last, step: 1, value: chosen[i] });
        const set = (index) => {
          chosen[i] = index;
          slider.value = index;
          slider.setAttribute("aria-valuetext", String(control.values[index]));
          value.textContent = String(control.values[index]);
          draw();
        };
        slider.setAttribute("aria-valuetext", String(control.values[chosen[i]]));
        const play = html("button", { type: "button", "aria-label": `Play ${control.label}`, "aria-pressed": "false" });
        let timer = null;
        const icon = (path) => {
          play.replaceChildren();
          svg(svg(play, "svg", { viewBox: "0 0 12 12", width: 12, height: 12, "aria-hidden": "true" }), "path", { d: path, fill: "currentColor" });
        };
        const stop = () => {
          clearInterval(timer);
          timer = null;
          play.setAttribute("aria-pressed", "false");
          icon("M2.5 1 L11 6 L2.5 11 Z");
        };
        slider.addEventListener("input", () => { stop(); set(Number(slider.value)); });
        play.addEventListener("click", () => {
          if (timer) { stop(); return; }
          if (chosen[i] === last) set(0);
          play.setAttribute("aria-pressed", "true");
          icon("M2 1 H5 V11 H2 Z M7 1 H10 V11 H7 Z");
          timer = setInterval(() => {
            if (chosen[i] >= last) { stop(); return; }
            set(chosen[i] + 1);
          }, Math.min(Math.max(6000 / (last + 1), 120), 600));
        });
        stop();
        row.append(...(last > 1 ? [play] : []), slider);
        holder.append(value, row);
      } else {
        const select = html("select", { id: input });
        control.values.forEach((v, index) => {
          const option = html("option", { value: index }, said(v));
          option.selected = index === chosen[i];
          select.append(option);
        });
        select.addEventListener("change", () => { chosen[i] = Number(select.value); draw(); });
        holder.append(select);
      }
      controls.append(holder);
    });

    const point = (event) => {
      const picture = stage.querySelector("svg");
      const bounds = (picture || stage).getBoundingClientRect();
      const ratio = picture ? drawnWidth / bounds.width : 1;
      cell = view.find((event.clientX - bounds.left) * ratio, (event.clientY - bounds.top) * ratio, event.target);
      tell();
    };
    stage.addEventListener("pointermove", point);
    stage.addEventListener("pointerdown", point);
    stage.addEventListener("pointerleave", () => { cell = null; tell(); });
    stage.addEventListener("blur", () => { cell = null; tell(); });
    stage.addEventListener("keydown", (event) => {
      const step = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] }[event.key];
      if (event.key === "Escape" && cell) { cell = null; tell(); return; }
      if (!step || event.altKey || event.ctrlKey || event.metaKey) return;
      if ((step[0] && view.columns === 1) || (step[1] && view.rows === 1)) return;
      event.preventDefault();
      const clamp = (v, n) => Math.min(Math.max(v, 0), n - 1);
      cell = cell ? [clamp(cell[0] + step[0], view.columns), clamp(cell[1] + step[1], view.rows)] : [0, 0];
      tell();
    });

    draw();
    if (window.ResizeObserver) {
      new ResizeObserver(() => {
        const width = Math.max(Math.round(stage.clientWidth), 260);
        if (stage.clientWidth && Math.abs(width - drawnWidth) > 1) draw();
      }).observe(stage);
    }
  };

  const start = () => document.querySelectorAll("figure.atlas-explore").forEach(setUp);
  if (document.readyState === "loading") document.addEventListener("DOMContentLoaded", start);
  else start();
})();
