// Lets the figures of a page answer to the pointer: values, series shown and hidden by the legend, zoom over time, marks
// that lead to the decision log. Everything is read from the drawn elements; without this script a page shows the same.
"use strict";
(() => {
  const SVG = "http://www.w3.org/2000/svg";
  const MOST_ROWS = 14; // of a tooltip
  const NEAR = 26; // how far a point may be from the pointer, in units of the drawing
  const DRAWN = 1e-4; // share of an axis to which the drawing is exact
  const make = (name, attributes, parent) => {
    const node = document.createElementNS(SVG, name);
    for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
    parent?.append(node);
    return node;
  };
  const tip = Object.assign(document.createElement("div"), { className: "tip", hidden: true });
  document.body.append(tip);

  const hidden = new Set(); // labels of series, over all figures
  const charts = [];

  /** A number as a person reads it, to three or four digits. */
  function number(value) {
    const size = Math.abs(value);
    if (size >= 1000) return Math.round(value).toLocaleString("en");
    if (size !== 0 && size < 0.001) return value.toExponential(2);
    return String(Number(value.toPrecision(size >= 100 ? 4 : 3)));
  }

  function seconds(value) {
    const [unit, scale] = value < 1e-3 ? ["µs", 1e6] : value < 1 ? ["ms", 1e3] : ["s", 1];
    return `${number(value * scale)} ${unit}`;
  }

  /** One axis: from places of the drawing to values, between `from` and `to`. */
  class Scale {
    constructor(facts, from, to) {
      Object.assign(this, facts, { from, to });
    }
    value(place) {
      const share = (place - this.from) / (this.to - this.from);
      if (this.log) return this.low * (this.high / this.low) ** share;
      const value = this.low + (this.high - this.low) * share;
      return Math.abs(value) < Math.abs(this.high - this.low) * DRAWN ? 0 : value;
    }
    place(value) {
      const share = this.log
        ? Math.log(value / this.low) / Math.log(this.high / this.low)
        : (value - this.low) / (this.high - this.low);
      return this.from + share * (this.to - this.from);
    }
    text(value) {
      if (this.names) {
        const [, name] = this.names.reduce((a, b) => (Math.abs(b[0] - value) < Math.abs(a[0] - value) ? b : a));
        return name;
      }
      return this.seconds ? seconds(value) : number(value);
    }
  }

  /** The points of a series as [x, y, starts a new stretch] in units of the drawing. */
  function pointsOf(series, axes) {
    if (series.kind === "given") {
      const all = [];
      let last = null;
      for (const [x, y] of series.values) {
        const gap = y === null;
        if (last !== null) all.push([axes.x.place(x), last, false]); // a step: the value holds until the next
        if (!gap) all.push([axes.x.place(x), axes.y.place(y), last === null]);
        last = gap ? null : axes.y.place(y);
      }
      return all;
    }
    const all = [];
    for (const node of series.nodes) {
      if (series.kind === "points") {
        for (const use of node.querySelectorAll("use")) all.push([+use.getAttribute("x"), +use.getAttribute("y"), true]);
      } else if (series.kind === "line") {
        const path = node.querySelector("path[d]");
        for (const [, letter, x, y] of path?.getAttribute("d").matchAll(/([ML])\s*(-?[\d.]+)\s+(-?[\d.]+)/g) ?? [])
          all.push([+x, +y, letter === "M"]);
      }
    }
    return all;
  }

  /** Where a line is at this x; null where it is not. */
  function at(points, x) {
    for (let i = 1; i < points.length; i++) {
      const [x0, y0] = points[i - 1], [x1, y1, starts] = points[i];
      if (starts || x < Math.min(x0, x1) || x > Math.max(x0, x1)) continue;
      return x1 === x0 ? y1 : y0 + ((y1 - y0) * (x - x0)) / (x1 - x0);
    }
    return null;
  }

  class Axes {
    constructor(chart, facts, place) {
      const [left, top, right, bottom] = facts.box;
      Object.assign(this, facts, { chart, left, top, right, bottom, low: 0, high: 1 });
      this.x = new Scale(facts.x, left, right);
      this.y = new Scale(facts.y, bottom, top);
      for (const series of this.series) {
        series.nodes = series.ids.map((id) => document.getElementById(id)).filter(Boolean);
        series.points = pointsOf(series, this);
      }
      this.clip = `${chart.figure.id}-zoom-${place}`;
    }
    holds([x, y]) {
      return x >= this.left && x <= this.right && y >= this.top && y <= this.bottom;
    }
    /** The place in the unzoomed drawing that is shown at this one, and the other way. */
    original(x) {
      return this.left + (this.low + ((x - this.left) / (this.right - this.left)) * (this.high - this.low)) * (this.right - this.left);
    }
    shown(x) {
      return this.left + (((x - this.left) / (this.right - this.left) - this.low) / (this.high - this.low)) * (this.right - this.left);
    }
    visible() {
      return this.series.filter((series) => !hidden.has(series.label));
    }

    /** What the tooltip says at a place: a head, rows of [colour, label, value], and where marks go. */
    read([px, y]) {
      const x = this.original(px);
      const bar = this.bar(x, y);
      if (bar) return bar;
      const near = this.nearest(x, y);
      if (near) return near;
      const rows = [], dots = [];
      for (const series of this.visible()) {
        if (series.kind !== "line" && series.kind !== "given") continue;
        const place = at(series.points, x);
        if (place === null) continue;
        rows.push([place, series.color, series.label, this.y.text(this.y.value(place))]);
        dots.push([px, place, series.color]);
      }
      if (!rows.length) return null;
      rows.sort((a, b) => a[0] - b[0]);
      const name = this.x.label || (this.zooms ? this.chart.axes.at(-1).x.label : "");
      const head = `${name || this.title}: ${this.x.text(this.x.value(x))}`;
      const title = name && this.title.toLowerCase() !== this.y.label.toLowerCase() ? this.title : "";
      const unit = [title, this.y.label || this.chart.shared(this.y)].filter(Boolean).join(", ");
      return { head, unit, rows: rows.map((row) => row.slice(1)), dots, line: true };
    }
    nearest(x, y) {
      let best = null;
      for (const series of this.visible()) {
        if (series.kind !== "points") continue;
        for (const [a, b] of series.points) {
          const far = Math.hypot(this.shown(a) - this.shown(x), b - y);
          if (far < NEAR && (!best || far < best.far)) best = { far, a, b, series };
        }
      }
      if (!best) return null;
      return {
        head: best.series.label,
        rows: [
          [null, this.x.label || this.title, this.x.text(this.x.value(best.a))],
          [null, this.y.label || "", this.y.text(this.y.value(best.b))],
        ].filter((row) => row[1]),
        dots: [[this.shown(best.a), best.b, best.series.color]],
      };
    }
    bar(x, y) {
      const lying = Boolean(this.y.names);
      for (const series of this.visible()) {
        if (series.kind !== "bars") continue;
        for (const node of series.nodes) {
          const box = node.getBBox();
          const inside = lying ? y >= box.y && y <= box.y + box.height : x >= box.x && x <= box.x + box.width;
          if (!inside || (!lying && box.height < 0.5)) continue;
          const [names, place, scale, end] = lying
            ? [this.y, box.y + box.height / 2, this.x, box.x + box.width]
            : [this.x, box.x + box.width / 2, this.y, box.y];
          const head = [this.title, `${names.label} ${names.text(names.value(place))}`.trim()].filter(Boolean).join(", ");
          return { head, unit: scale.label || this.chart.shared(scale), rows: [[series.color, series.label, scale.text(scale.value(end))]], dots: [] };
        }
      }
      return null;
    }

    /** Shows the part of the run between two shares of it. */
    zoom(low, high) {
      Object.assign(this, { low, high });
      const whole = low === 0 && high === 1;
      if (!this.wrapped) {
        const clip = make("clipPath", { id: this.clip }, this.chart.svg);
        make("rect", { x: this.left, y: this.top, width: this.right - this.left, height: this.bottom - this.top }, clip);
        this.nodes = this.moved.map((id) => document.getElementById(id)).filter(Boolean);
        for (const node of this.nodes) {
          for (const inner of [node, ...node.querySelectorAll("[clip-path]")]) inner.removeAttribute("clip-path");
          const frame = make("g", { "clip-path": `url(#${this.clip})` });
          node.replaceWith(frame);
          frame.append(node);
        }
        this.ticks = make("g", { class: "ticks" }, document.getElementById(this.x_axis));
        this.wrapped = true;
      }
      const k = 1 / (high - low), shift = this.left * (1 - k) - low * (this.right - this.left) * k;
      for (const node of this.nodes) node.setAttribute("transform", `matrix(${k} 0 0 1 ${shift} 0)`);
      for (const tick of document.querySelectorAll(`[id="${CSS.escape(this.x_axis)}"] [id*="xtick"]`))
        tick.style.display = whole ? "" : "none";
      this.ticks.replaceChildren();
      if (whole) return;
      for (const value of this.round()) {
        const x = this.shown(this.x.place(value));
        make("path", { d: `M${x} ${this.top}V${this.bottom}`, class: "grid" }, this.ticks);
        if (this.x.labelled) make("text", { x, y: this.bottom + 13 }, this.ticks).textContent = number(value);
      }
    }
    /** Five or so round values between the ends. */
    round() {
      const low = this.x.value(this.original(this.left)), high = this.x.value(this.original(this.right));
      const rough = (high - low) / 6, power = 10 ** Math.floor(Math.log10(rough));
      const step = [1, 2, 5, 10].map((m) => m * power).find((s) => s >= rough);
      const found = [];
      for (let i = Math.ceil(low / step); i * step <= high; i++) found.push(i * step);
      return found;
    }
  }

  class Chart {
    constructor(figure, facts) {
      Object.assign(this, { figure, svg: figure.querySelector("svg") });
      this.axes = facts.axes.map((each, place) => new Axes(this, each, place));
      this.over = make("g", { class: "over" }, this.svg);
      this.legend(facts.legend);
      if (facts.marks) this.marks(facts.marks);
      this.svg.addEventListener("pointermove", (event) => this.move(event));
      this.svg.addEventListener("pointerleave", () => this.leave());
      if (this.axes.some((axes) => axes.zooms)) this.zoomable();
    }
    /** What an axis without a label of its own shows: the label of the first like it. */
    shared(scale) {
      return this.axes.find(({ y }) => y.label && y.low === scale.low && y.high === scale.high)?.y.label ?? "";
    }
    place(event) {
      const point = new DOMPoint(event.clientX, event.clientY).matrixTransform(this.svg.getScreenCTM().inverse());
      return [point.x, point.y];
    }
    leave() {
      this.over.replaceChildren();
      tip.hidden = true;
    }
    move(event) {
      this.leave();
      const place = this.place(event);
      const axes = this.axes.find((each) => each.holds(place));
      if (this.from) return this.select(place);
      const found = axes?.read(place);
      if (!found) return;
      if (found.line)
        for (const each of axes.zooms ? this.axes : [axes])
          make("path", { d: `M${place[0]} ${each.top}V${each.bottom}`, class: "cross" }, this.over);
      for (const [x, y, color] of found.dots) make("circle", { cx: x, cy: y, r: 3.5, fill: color ?? "currentColor" }, this.over);
      say(found, event);
    }

    /** Entries of the legend are switches, and act on all figures of the page. */
    legend(entries) {
      const known = new Set(this.axes.flatMap((axes) => axes.series.filter((s) => s.ids.length).map((s) => s.label)));
      this.entries = [];
      for (const { label, ids } of entries) {
        if (!known.has(label)) continue;
        const nodes = ids.map((id) => document.getElementById(id)).filter(Boolean);
        this.entries.push({ label, nodes });
        const [text] = nodes;
        for (const [key, value] of Object.entries({ role: "button", tabindex: "0", "aria-pressed": "true" })) text?.setAttribute(key, value);
        make("title", {}, text).textContent = "show or hide";
        for (const node of nodes) {
          node.classList.add("switch");
          node.addEventListener("click", () => toggle(label));
        }
        text?.addEventListener("keydown", (event) => {
          if (event.key !== "Enter" && event.key !== " ") return;
          event.preventDefault();
          toggle(label);
        });
      }
    }
    show() {
      for (const axes of this.axes)
        for (const series of axes.series)
          for (const node of series.nodes) node.style.display = hidden.has(series.label) ? "none" : "";
      for (const { label, nodes } of this.entries) {
        nodes[0]?.setAttribute("aria-pressed", String(!hidden.has(label)));
        for (const node of nodes) node.classList.toggle("off", hidden.has(label));
      }
    }

    /** Each mark of a decision leads to its row in the log. */
    marks({ id, rows }) {
      const uses = [...(document.getElementById(id)?.querySelectorAll("use") ?? [])];
      this.marked = uses.map((use, i) => {
        const [anchor, words] = rows[i];
        const link = make("a", { href: `#${anchor}`, class: "mark", "aria-label": words });
        use.replaceWith(link);
        link.append(use);
        link.addEventListener("click", () => open(anchor));
        link.addEventListener("pointermove", (event) => {
          event.stopPropagation();
          this.leave();
          say({ head: words, rows: [], unit: "" }, event);
        });
        return { use, link, x: +use.getAttribute("x") };
      });
    }

    zoomable() {
      this.svg.style.touchAction = "pan-y";
      this.back = Object.assign(document.createElement("button"), { type: "button", className: "whole", hidden: true });
      this.back.textContent = "whole run";
      this.back.addEventListener("click", () => this.zoom(0, 1));
      const hint = Object.assign(document.createElement("span"), { className: "hint" });
      hint.textContent = "Drag over a time to zoom in.";
      this.figure.querySelector("h3").after(this.back, hint);
      this.svg.addEventListener("pointerdown", (event) => {
        const place = this.place(event);
        if (event.button === 0 && !event.target.closest("a") && this.axes.some((axes) => axes.holds(place))) {
          this.from = place;
          event.preventDefault();
        }
      });
      window.addEventListener("pointerup", (event) => {
        const from = this.from;
        this.from = null;
        if (!from) return;
        this.over.replaceChildren();
        const ends = [from[0], this.place(event)[0]].sort((a, b) => a - b);
        const [{ left, right }] = this.axes;
        if (ends[1] - ends[0] < 6) return;
        const [low, high] = ends.map((x) => (this.axes[0].original(Math.min(Math.max(x, left), right)) - left) / (right - left));
        this.zoom(low, high);
      });
      this.svg.addEventListener("dblclick", () => this.zoom(0, 1));
    }
    select([x]) {
      const { left, right } = this.axes[0], to = Math.min(Math.max(x, left), right);
      for (const axes of this.axes)
        make("rect", {
          x: Math.min(this.from[0], to), y: axes.top, width: Math.abs(to - this.from[0]), height: axes.bottom - axes.top, class: "selected",
        }, this.over);
    }
    zoom(low, high) {
      if (high - low < 1e-4) return;
      for (const axes of this.axes) axes.zoom(low, high);
      this.figure.classList.toggle("zoomed", !(low === 0 && high === 1));
      this.back.hidden = low === 0 && high === 1;
      const [axes] = this.axes;
      for (const { use, link, x } of this.marked ?? []) {
        const now = axes.shown(x);
        use.setAttribute("x", now);
        link.style.display = now < axes.left - 1 || now > axes.right + 1 ? "none" : "";
      }
    }
  }

  function toggle(label) {
    if (!hidden.delete(label)) hidden.add(label);
    for (const chart of charts) chart.show();
  }

  /** The row that an anchor names, with everything around it open. */
  function open(anchor) {
    for (let node = document.getElementById(anchor); node; node = node.parentElement) if (node.tagName === "DETAILS") node.open = true;
  }

  function say({ head, unit, rows }, event) {
    const cell = (tag, text, name) => Object.assign(document.createElement(tag), { textContent: text, className: name ?? "" });
    tip.replaceChildren(cell("div", head, "head"));
    if (unit) tip.append(cell("div", unit, "unit"));
    for (const [color, label, value] of rows.slice(0, MOST_ROWS)) {
      const row = cell("div", "", "row"), key = cell("i", "");
      if (color) key.style.background = color;
      row.append(key, cell("span", label), cell("b", value));
      tip.append(row);
    }
    if (rows.length > MOST_ROWS) tip.append(cell("div", `and ${rows.length - MOST_ROWS} more`, "unit"));
    tip.hidden = false;
    const { width, height } = tip.getBoundingClientRect();
    const x = event.clientX + 16 + width > innerWidth ? event.clientX - 16 - width : event.clientX + 16;
    const y = Math.min(event.clientY + 16, innerHeight - height - 8);
    Object.assign(tip.style, { left: `${Math.max(4, x)}px`, top: `${Math.max(4, y)}px` });
  }

  for (const data of document.querySelectorAll('script[type="application/json"][data-figure]')) {
    const figure = document.getElementById(data.dataset.figure);
    if (figure?.querySelector("svg")) charts.push(new Chart(figure, JSON.parse(data.textContent)));
  }
  if (location.hash) open(decodeURIComponent(location.hash.slice(1)));
  addEventListener("hashchange", () => open(decodeURIComponent(location.hash.slice(1))));
})();
