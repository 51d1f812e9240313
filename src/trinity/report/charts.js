"use strict";
// Drawing: line charts as SVG, heat maps on canvas. All charts of the page share one cursor and one zoom per stage.

const SVG = "http://www.w3.org/2000/svg";
const el = (name, attributes = {}, ...children) => {
  const node = document.createElement(name);
  for (const [k, v] of Object.entries(attributes)) node.setAttribute(k, v);
  node.append(...children);
  return node;
};
const svg = (name, attributes = {}, text) => {
  const node = document.createElementNS(SVG, name);
  for (const [k, v] of Object.entries(attributes)) node.setAttribute(k, v);
  if (text !== undefined) node.textContent = text;
  return node;
};
const clamp = (v, lo, hi) => Math.min(hi, Math.max(lo, v));

function format(v, kind) {
  if (v === null || v === undefined || !Number.isFinite(v)) return "–";
  if (v < 0) return "\u2212" + format(-v, kind);
  const a = Math.abs(v);
  if (kind === "percent") return +(100 * a).toFixed(a < 0.1 ? 2 : 1) + "%";
  if (kind === "int") return Math.round(a).toLocaleString("en");
  if (a >= 1e4) {
    for (const [size, unit] of [[1e12, "T"], [1e9, "B"], [1e6, "M"], [1e3, "k"]])
      if (a >= size) return +(v / size).toPrecision(3) + unit;
  }
  if (a !== 0 && a < 1e-3) return String(+v.toPrecision(3)).includes("e") ? String(+v.toPrecision(3)) : +(v / 10 ** Math.floor(Math.log10(v))).toPrecision(3) + "e" + Math.floor(Math.log10(v));
  return String(+v.toPrecision(4));
}

// Index of the last value <= x in a rising list, at least 0.
function before(list, x) {
  let lo = 0, hi = list.length - 1;
  while (lo < hi) {
    const mid = (lo + hi + 1) >> 1;
    if (list[mid] <= x) lo = mid; else hi = mid - 1;
  }
  return lo;
}
function nearestIndex(list, x) {
  const i = before(list, x);
  return i + 1 < list.length && Math.abs(list[i + 1] - x) < Math.abs(list[i] - x) ? i + 1 : i;
}
// Piecewise linear, from the rising list `from` to the list `to`; linear beyond the ends.
function interpolate(from, to, x) {
  if (from.length < 2) return from.length ? to[0] : x;
  const i = Math.min(before(from, x), from.length - 2);
  const width = from[i + 1] - from[i];
  return width ? to[i] + (to[i + 1] - to[i]) * (x - from[i]) / width : to[i];
}

function linearTicks(lo, hi, count) {
  const raw = (hi - lo) / Math.max(1, count), power = 10 ** Math.floor(Math.log10(raw));
  const step = power * [1, 2, 5, 10].find((m) => m * power >= raw * 0.999);
  const ticks = [];
  for (let i = Math.ceil(lo / step - 1e-9); i * step <= hi + step * 1e-9; i++) ticks.push(+(i * step).toPrecision(12) + 0);
  return ticks;
}
function logTicks(lo, hi) {
  const ticks = [];
  const decades = Math.log10(hi / lo);
  const steps = decades > 4 ? [1] : decades > 1.2 ? [1, 2, 5] : [1, 1.5, 2, 3, 4, 5, 6, 7, 8, 9];
  for (let e = Math.floor(Math.log10(lo)); e <= Math.ceil(Math.log10(hi)); e++)
    for (const m of steps) if (m * 10 ** e >= lo * 0.999 && m * 10 ** e <= hi * 1.001) ticks.push(m * 10 ** e);
  return ticks.length > 8 ? ticks.filter((_, i) => i % Math.ceil(ticks.length / 8) === 0) : ticks;
}

const GLYPH = { skip: "▲", rollback: "↶", jump: "»", resume: "↻", stop: "■", dead_expert: "●", checkpoint: "│" };
const GLYPH_COLOR = { skip: "--c4", rollback: "--bad", jump: "--c4", resume: "--good", stop: "--bad", dead_expert: "--c3", checkpoint: "--faint" };

class LineChart {
  constructor(figure, page) {
    this.figure = figure;
    this.page = page;
    this.plot = figure.querySelector(".plot");
    this.legend = figure.querySelector(".legend");
    this.tools = figure.querySelector(".tools");
    this.title = figure.querySelector("h3").textContent;
    this.fixed = figure.dataset.fixed === undefined ? null : +figure.dataset.fixed;
    this.hidden = new Set();
    this.log = null;
  }

  get stage() { return this.page.stages[this.fixed ?? this.page.stage]; }

  draw() {
    const chart = this.stage.charts[this.figure.dataset.chart];
    this.chart = chart;
    this.plot.replaceChildren();
    this.legend.replaceChildren();
    this.tools.replaceChildren();
    if (!chart) {
      this.plot.append(el("p", { class: "empty" }, `No data: ${this.stage.title.toLowerCase()} recorded no values for this chart.`));
      return;
    }
    if (this.log === null) this.log = !!chart.start_log;
    if (chart.log) {
      const button = el("button", { type: "button", "aria-pressed": String(this.log), title: "Switch between a linear and a logarithmic scale" }, this.log ? "log" : "linear");
      button.onclick = () => { this.log = !this.log; this.draw(); };
      this.tools.append(button);
    }
    this.curves = chart.curves.map((c, i) => ({ ...c, color: `var(--c${i % 12})`, at: c.x.map((s) => this.page.toAxis(this.stage, s)) }));
    this.layout();
    this.legendItems();
    this.cursor();
  }

  range() {
    const all = this.curves.flatMap((c) => [c.at[0], c.at[c.at.length - 1]]);
    const zoom = this.page.zoomOf(this.stage);
    let [x0, x1] = zoom ? zoom.map((s) => this.page.toAxis(this.stage, s)) : [Math.min(0, ...all), Math.max(...all)];
    if (!(x1 > x0)) { x0 -= 0.5; x1 += 0.5; }
    let lo = Infinity, hi = -Infinity;
    for (const c of this.curves) {
      if (this.hidden.has(c.label)) continue;
      c.at.forEach((x, i) => {
        if (x < x0 || x > x1) return;
        for (const key of ["y", "lo", "hi"]) {
          const v = c[key]?.[i];
          if (v === null || v === undefined || (this.log && v <= 0)) continue;
          lo = Math.min(lo, v); hi = Math.max(hi, v);
        }
      });
    }
    if (!Number.isFinite(lo)) [lo, hi] = this.log ? [1, 10] : [0, 1];
    if (this.chart.unit) [lo, hi] = [0, 1];
    if (this.chart.zero && !this.log) { lo = Math.min(0, lo); hi = Math.max(0, hi); }
    if (hi - lo < 1e-12 * Math.abs(hi) || hi === lo) {
      const pad = Math.abs(hi) * 0.1 || 1;
      if (this.log) { lo /= 1.2; hi *= 1.2; } else { hi += pad; if (!this.chart.zero) lo -= pad; }
    }
    if (this.log) { const f = (hi / lo) ** 0.04; return [x0, x1, lo / f, hi * f]; }
    const pad = (hi - lo) * 0.05;
    return [x0, x1, this.chart.unit || (this.chart.zero && lo === 0) ? lo : lo - pad, hi + (this.chart.unit ? 0 : pad)];
  }

  layout() {
    const wide = this.figure.classList.contains("wide");
    const width = Math.max(220, this.plot.clientWidth), height = wide ? clamp(width * 0.32, 230, 340) : 200;
    const [x0, x1, lo, hi] = this.range();
    const bands = this.chart.marks ? this.stage.bands : [];
    const ticks = this.log ? logTicks(lo, hi) : linearTicks(lo, hi, height / 48);
    const labels = ticks.map((t) => format(t, this.chart.format));
    const left = 12 + 6.3 * Math.max(2, ...labels.map((l) => l.length)), top = bands.length > 1 ? 20 : 8, bottom = this.chart.marks ? 36 : 22;
    this.box = { width, height, left, right: width - 8, top, bottom: height - bottom, x0, x1 };
    const b = this.box;
    const X = this.X = (x) => b.left + (x - x0) / (x1 - x0) * (b.right - b.left);
    const scale = this.log ? Math.log10 : (v) => v;
    const [s0, s1] = [scale(lo), scale(hi)];
    const Y = this.Y = (v) => b.bottom - (scale(v) - s0) / (s1 - s0) * (b.bottom - b.top);

    const root = this.root = svg("svg", { viewBox: `0 0 ${width} ${height}`, height, role: "img", tabindex: 0, "aria-label": this.summary() });
    const clip = `clip-${this.figure.dataset.chart}-${this.fixed ?? "x"}`;
    const defs = svg("defs"), clipPath = svg("clipPath", { id: clip });
    clipPath.append(svg("rect", { x: b.left, y: b.top - 2, width: b.right - b.left, height: b.bottom - b.top + 4 }));
    defs.append(clipPath);
    root.append(defs);

    bands.forEach((band, i) => {
      const from = clamp(X(this.page.toAxis(this.stage, i ? band.from : 0)), b.left, b.right), to = clamp(X(this.page.toAxis(this.stage, band.to)), b.left, b.right);
      if (to - from < 1) return;
      if (i % 2 === 0 && bands.length > 1) root.append(svg("rect", { x: from, y: 0, width: to - from, height: b.bottom, fill: "var(--band)" }));
      if (bands.length > 1 && to - from > band.name.length * 6.5 + 8) root.append(svg("text", { x: from + 6, y: 13, class: "band-name" }, band.name));
    });
    ticks.forEach((t, i) => {
      root.append(svg("line", { x1: b.left, x2: b.right, y1: Y(t), y2: Y(t), stroke: "var(--grid)" }));
      root.append(svg("text", { x: b.left - 7, y: Y(t) + 4, "text-anchor": "end" }, labels[i]));
    });
    root.append(svg("line", { x1: b.left, x2: b.right, y1: b.bottom, y2: b.bottom, stroke: "var(--line)" }));
    const xTicks = linearTicks(x0, x1, (b.right - b.left) / 90);
    xTicks.forEach((t) => {
      const x = X(t), last = x > b.right - 14;
      root.append(svg("text", { x: last ? b.right : x, y: b.bottom + 15, "text-anchor": last ? "end" : "middle" }, format(t)));
    });
    if (this.chart.marks) this.marks(root);

    const body = svg("g", { "clip-path": `url(#${clip})` });
    for (const c of this.curves) if (!this.hidden.has(c.label)) this.curve(body, c);
    root.append(body);

    this.rule = svg("line", { y1: b.top, y2: b.bottom, stroke: "var(--faint)", "stroke-dasharray": "2 3", visibility: "hidden" });
    this.dots = this.curves.map((c) => svg("circle", { r: 3.4, fill: c.color, stroke: "var(--card)", "stroke-width": 1.5, visibility: "hidden" }));
    this.brush = svg("rect", { y: b.top, height: b.bottom - b.top, fill: "var(--accent)", opacity: 0.14, visibility: "hidden" });
    root.append(this.rule, ...this.dots, this.brush);
    this.listen(root);
    this.plot.replaceChildren(root);
  }

  marks(root) {
    const b = this.box;
    for (const m of this.stage.marks) {
      const x = this.X(this.page.toAxis(this.stage, m.x));
      if (x < b.left || x > b.right) continue;
      const color = `var(${GLYPH_COLOR[m.kind]})`;
      if (m.kind !== "checkpoint") root.append(svg("line", { x1: x, x2: x, y1: b.top, y2: b.bottom, stroke: color, opacity: 0.3 }));
      const glyph = svg("text", { x, y: b.bottom + 30, "text-anchor": "middle", style: `fill:${color};font-size:${m.kind === "checkpoint" ? 8 : 11}px` }, GLYPH[m.kind]);
      glyph.append(svg("title", {}, `${m.kind.replace("_", " ")} at step ${m.x}`));
      root.append(glyph);
    }
  }

  path(c, values) {
    let d = "", open = false;
    values.forEach((v, i) => {
      if (v === null || v === undefined || (this.log && v <= 0)) { open = false; return; }
      d += `${open ? "L" : "M"}${this.X(c.at[i]).toFixed(1)} ${this.Y(v).toFixed(1)}`;
      open = true;
    });
    return d;
  }

  area(c) {
    const floor = this.box.bottom, y = (v) => (v === null || (this.log && v <= 0) ? floor : this.Y(v));
    const up = c.hi.map((v, i) => `${this.X(c.at[i]).toFixed(1)} ${y(v).toFixed(1)}`);
    const down = c.lo.map((v, i) => `${this.X(c.at[i]).toFixed(1)} ${y(v).toFixed(1)}`).reverse();
    return `M${up.join("L")}L${down.join("L")}Z`;
  }

  curve(body, c) {
    const line = (values, width, opacity) => body.append(svg("path", { d: this.path(c, values), fill: "none", stroke: c.color, "stroke-width": width, "stroke-linejoin": "round", opacity }));
    if (c.lo) body.append(svg("path", { d: this.area(c), fill: c.color, opacity: 0.17 }));
    if (c.kind === "span") { line(c.lo, 1.4, 1); line(c.hi, 1.4, 1); return; }
    if (c.kind !== "points") {
      if (c.s) { line(c.y, 1, 0.32); line(c.s, 2, 1); } else line(c.y, 1.7, 1);
    }
    if (c.kind === "points" || (c.kind === "joined" && c.x.length < 60) || c.x.length === 1)
      c.y.forEach((v, i) => v !== null && !(this.log && v <= 0) && body.append(svg("circle", { cx: this.X(c.at[i]), cy: this.Y(v), r: c.kind === "points" ? 3.6 : 2.8, fill: c.color, stroke: "var(--card)", "stroke-width": 1.2 })));
  }

  summary() {
    const parts = this.curves.map((c) => {
      if (c.kind === "span") return `${c.label} ends at ${format(c.lo.at(-1))} to ${format(c.hi.at(-1))}`;
      const seen = c.y.filter((v) => v !== null);
      return `${c.label} from ${format(seen[0], this.chart.format)} to ${format(seen.at(-1), this.chart.format)}`;
    });
    return `${this.title}: ${parts.join("; ")}. Arrow keys move the cursor.`;
  }

  legendItems() {
    this.values = this.curves.map((c) => {
      const value = el("b");
      const kind = c.kind === "points" ? " dot" : c.kind === "span" ? " area" : "";
      const swatch = el("i", { class: "swatch" + kind, style: `background:${c.color}` });
      const item = this.curves.length > 1
        ? el("button", { type: "button", "aria-pressed": String(!this.hidden.has(c.label)), title: "Show or hide" }, swatch, c.label + " ", value)
        : el("span", {}, swatch, c.label + " ", value);
      if (this.curves.length > 1) item.onclick = () => {
        if (!this.hidden.delete(c.label)) this.hidden.add(c.label);
        this.draw();
      };
      this.legend.append(item);
      return value;
    });
    this.at = el("span", { class: "at" });
    this.legend.append(this.at);
  }

  // Values under the shared cursor; without one, the last values.
  cursor() {
    if (!this.chart || !this.root) return;
    const step = this.page.cursorOf(this.stage);
    const on = step !== null;
    const x = on ? this.X(this.page.toAxis(this.stage, step)) : 0;
    const inside = on && x >= this.box.left - 0.5 && x <= this.box.right + 0.5;
    this.rule.setAttribute("visibility", inside ? "visible" : "hidden");
    this.rule.setAttribute("x1", x);
    this.rule.setAttribute("x2", x);
    this.curves.forEach((c, k) => {
      const i = on ? nearestIndex(c.x, step) : c.x.length - 1;
      const y = c.kind === "span" ? null : (c.s ?? c.y)[i];
      this.values[k].textContent = c.kind === "span" ? `${format(c.lo[i])} … ${format(c.hi[i])}` : format(y, this.chart.format);
      const show = inside && y !== null && y !== undefined && !this.hidden.has(c.label) && !(this.log && y <= 0);
      this.dots[k].setAttribute("visibility", show ? "visible" : "hidden");
      if (show) { this.dots[k].setAttribute("cx", this.X(c.at[i])); this.dots[k].setAttribute("cy", this.Y(y)); }
    });
    this.at.textContent = on ? `step ${Math.round(step).toLocaleString("en")}` : "last";
  }

  listen(root) {
    const b = this.box;
    const axisAt = (event) => {
      const r = root.getBoundingClientRect();
      const px = clamp((event.clientX - r.left) * b.width / r.width, b.left, b.right);
      return [px, b.x0 + (px - b.left) / (b.right - b.left) * (b.x1 - b.x0)];
    };
    let from = null;
    root.onpointermove = (event) => {
      const [px, x] = axisAt(event);
      this.page.setCursor(this.stage, this.page.toStep(this.stage, x));
      if (from === null) return;
      this.brush.setAttribute("visibility", "visible");
      this.brush.setAttribute("x", Math.min(px, from[0]));
      this.brush.setAttribute("width", Math.abs(px - from[0]));
    };
    root.onpointerdown = (event) => { if (event.pointerType === "mouse" && event.button === 0) from = axisAt(event); };
    root.onpointerup = (event) => {
      if (from === null) return;
      const to = axisAt(event), start = from;
      from = null;
      if (Math.abs(to[0] - start[0]) > 8)
        this.page.setZoom(this.stage, [start[1], to[1]].sort((a, c) => a - c).map((x) => this.page.toStep(this.stage, x)));
    };
    root.onpointerleave = () => { from = null; this.brush.setAttribute("visibility", "hidden"); this.page.setCursor(this.stage, null); };
    root.ondblclick = () => this.page.setZoom(this.stage, null);
    root.onblur = () => this.page.setCursor(this.stage, null);
    root.onkeydown = (event) => {
      const steps = this.curves[0].x, moves = { ArrowLeft: -1, ArrowRight: 1, PageUp: -20, PageDown: 20, Home: -Infinity, End: Infinity };
      if (event.key === "Escape") { this.page.setCursor(this.stage, null); this.page.setZoom(this.stage, null); return; }
      if (!(event.key in moves)) return;
      event.preventDefault();
      const now = this.page.cursorOf(this.stage);
      const i = now === null ? steps.length - 1 : nearestIndex(steps, now) + moves[event.key];
      this.page.setCursor(this.stage, steps[clamp(i, 0, steps.length - 1)]);
      this.page.say(this.legend.innerText);
    };
  }
}

// Colours along a list of anchors, t from 0 to 1.
function ramp(anchors, t) {
  const at = clamp(t, 0, 1) * (anchors.length - 1), i = Math.min(Math.floor(at), anchors.length - 2), f = at - i;
  return anchors[i].map((v, k) => Math.round(v + (anchors[i + 1][k] - v) * f));
}

// Paint `rows` x `columns` cells; color(r, c) gives [r, g, b].
function paint(canvas, rows, columns, color) {
  canvas.width = columns;
  canvas.height = rows;
  const context = canvas.getContext("2d"), image = context.createImageData(columns, rows);
  for (let r = 0, p = 0; r < rows; r++)
    for (let c = 0; c < columns; c++) {
      const [red, green, blue] = color(r, c);
      image.data[p++] = red; image.data[p++] = green; image.data[p++] = blue; image.data[p++] = 255;
    }
  context.putImageData(image, 0, 0);
}
