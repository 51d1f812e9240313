// The page: one state (stage, axis, zoom, cursor) and the figures that show it.

const DATA = JSON.parse(document.getElementById("data").textContent);

class Page {
  constructor(stages) {
    this.stages = stages;
    this.stage = 0;
    this.axis = "step";
    this.zoom = new Map();
    this.at = new Map();
    this.charts = [...document.querySelectorAll("figure[data-chart]")].map((f) => new LineChart(f, this));
    this.panels = [new LoadPanel(document.getElementById("load"), this), new HeatPanel(document.getElementById("heat"), this)];
  }
  axisOf(stage) { return stage.axis[this.axis] ? this.axis : "step"; }
  toAxis(stage, step) {
    const name = this.axisOf(stage);
    return name === "step" ? step : interpolate(stage.axis.step, stage.axis[name], step);
  }
  toStep(stage, x) {
    const name = this.axisOf(stage);
    return name === "step" ? x : interpolate(stage.axis[name], stage.axis.step, x);
  }
  zoomOf(stage) { return this.zoom.get(stage) ?? null; }
  cursorOf(stage) { return this.at.get(stage) ?? null; }
  setZoom(stage, range) {
    if (range) this.zoom.set(stage, range); else this.zoom.delete(stage);
    document.getElementById("unzoom").hidden = this.zoom.size === 0;
    this.draw();
  }
  setCursor(stage, step) {
    this.at.set(stage, step);
    if (this.pending) return;
    this.pending = true;
    requestAnimationFrame(() => {
      this.pending = false;
      for (const chart of this.charts) if (chart.stage === stage) chart.cursor();
    });
  }
  say(text) { document.getElementById("live").textContent = text.replace(/\s+/g, " "); }
  draw() { for (const part of [...this.charts, ...this.panels]) part.draw(); }
}

const decode = (text) => Uint8Array.from(atob(text), (c) => c.charCodeAt(0));
const isDark = () => {
  const theme = document.documentElement.dataset.theme;
  return theme ? theme === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
};
// Blue below the mean, orange above it; the middle is the page's own shade.
const loadRamp = () => isDark()
  ? [[126, 190, 245], [52, 116, 178], [40, 44, 51], [178, 92, 28], [255, 176, 96]]
  : [[11, 72, 135], [104, 165, 214], [243, 241, 236], [240, 160, 90], [166, 66, 0]];
const valueRamp = () => isDark()
  ? [[30, 36, 48], [36, 74, 118], [58, 131, 170], [132, 190, 176], [245, 232, 160]]
  : [[247, 243, 228], [188, 214, 190], [94, 160, 186], [38, 96, 154], [22, 38, 84]];
const DEAD = [214, 40, 110];

class LoadPanel {
  constructor(figure, page) {
    this.figure = figure;
    this.page = page;
    this.plot = figure.querySelector(".plot");
    this.select = figure.querySelector(".layer");
    this.select.onchange = () => { this.layer = +this.select.value; this.show(); };
    this.layer = 0;
  }

  draw() {
    const load = this.page.stages[this.page.stage].load;
    this.plot.replaceChildren();
    this.select.parentElement.hidden = !load;
    if (!load) {
      this.plot.append(el("p", { class: "empty" }, "No data: this stage recorded no expert loads."));
      return;
    }
    if (this.load !== load) {
      this.load = load;
      load.bytes ??= decode(load.data);
      this.time = load.steps.length - 1;
      this.layer = Math.min(this.layer, load.layers - 1);
    }
    this.select.replaceChildren(...Array.from({ length: load.layers }, (_, i) => el("option", { value: i }, String(i + load.first))));
    this.left = el("canvas", { role: "img", "aria-label": "Expert load of all layers at one step" });
    this.right = el("canvas", { role: "img", "aria-label": "Expert load of one layer over time" });
    this.slider = el("input", { type: "range", min: 0, max: load.steps.length - 1, step: 1, "aria-label": "Step shown" });
    this.play = el("button", { type: "button" }, "Play");
    this.when = el("span");
    this.leftReadout = el("p", { class: "readout" });
    this.rightReadout = el("p", { class: "readout" });
    this.rightTitle = el("h4");
    const height = clamp(load.layers * 16, 120, 380);
    this.left.style.height = this.right.style.height = `${height}px`;
    this.plot.append(
      el("div", { class: "loadgrid" },
        el("div", {}, el("h4", {}, "All layers"), el("div", { class: "heat" }, this.left),
          el("div", { class: "heatx" }, el("span", {}, "expert 0"), el("span", {}, `layers ${load.first} to ${load.first + load.layers - 1}, downward`), el("span", {}, `expert ${load.experts - 1}`)),
          el("div", { class: "slider" }, this.play, this.slider, this.when), this.leftReadout),
        el("div", {}, this.rightTitle, el("div", { class: "heat" }, this.right),
          el("div", { class: "heatx" }, el("span", {}, `step ${load.steps[0].toLocaleString("en")}`), el("span", {}, `experts 0 to ${load.experts - 1}, downward`), el("span", {}, `step ${load.steps.at(-1).toLocaleString("en")}`)),
          this.rightReadout)),
      this.scale());
    this.slider.oninput = () => { this.time = +this.slider.value; this.show(); };
    this.play.onclick = () => this.toggle();
    this.left.onpointermove = (e) => this.read(e, this.left, load.layers, load.experts, (r, c) => [this.time, r, c], this.leftReadout);
    this.right.onpointermove = (e) => this.read(e, this.right, load.experts, load.steps.length, (r, c) => [c, this.layer, r], this.rightReadout);
    this.left.onclick = (e) => { this.layer = this.cell(e, this.left, load.layers, load.experts)[0]; this.show(); };
    this.right.onclick = (e) => { this.time = this.cell(e, this.right, load.experts, load.steps.length)[1]; this.show(); };
    this.show();
  }

  byte(time, layer, expert) { return this.load.bytes[(time * this.load.layers + layer) * this.load.experts + expert]; }

  show() {
    const load = this.load, colors = Array.from({ length: 256 }, (_, v) => (v === 0 ? DEAD : ramp(loadRamp(), (v - 1) / 254)));
    paint(this.left, load.layers, load.experts, (r, c) => colors[this.byte(this.time, r, c)]);
    paint(this.right, load.experts, load.steps.length, (r, c) => colors[this.byte(c, this.layer, r)]);
    this.slider.value = this.time;
    this.select.value = this.layer;
    this.when.textContent = `step ${load.steps[this.time].toLocaleString("en")}`;
    this.rightTitle.textContent = `Layer ${this.layer + load.first} over time`;
    this.leftReadout.textContent = this.rightReadout.textContent = "";
  }

  toggle() {
    if (this.timer) { clearInterval(this.timer); this.timer = null; this.play.textContent = "Play"; return; }
    if (this.time === this.load.steps.length - 1) this.time = 0;
    this.play.textContent = "Pause";
    this.timer = setInterval(() => {
      if (this.time >= this.load.steps.length - 1) this.toggle();
      else { this.time++; this.show(); }
    }, 120);
  }

  cell(event, canvas, rows, columns) {
    const r = canvas.getBoundingClientRect();
    return [clamp(Math.floor((event.clientY - r.top) / r.height * rows), 0, rows - 1), clamp(Math.floor((event.clientX - r.left) / r.width * columns), 0, columns - 1)];
  }

  read(event, canvas, rows, columns, place, readout) {
    const [time, layer, expert] = place(...this.cell(event, canvas, rows, columns));
    const v = this.byte(time, layer, expert);
    const share = v === 0 ? "no token" : `${v === 1 ? "at most " : v === 255 ? "at least " : ""}${(2 ** ((v - 128) / 127 * 3)).toFixed(2)} of the mean`;
    readout.textContent = `step ${this.load.steps[time].toLocaleString("en")}, layer ${layer + this.load.first}, expert ${expert}: ${share}`;
  }

  scale() {
    const bar = el("canvas", { "aria-hidden": "true" });
    paint(bar, 1, 128, (_, c) => ramp(loadRamp(), c / 127));
    return el("div", { class: "scale" }, "1/8", bar, "8 times the mean", el("i", { class: "swatch dot", style: `background:rgb(${DEAD})` }), "no token at all");
  }
}

class HeatPanel {
  constructor(figure, page) {
    this.plot = figure.querySelector(".plot");
    this.page = page;
    this.select = figure.querySelector(".value");
    this.select.onchange = () => { this.title = this.select.value; this.draw(); };
  }

  draw() {
    const stage = this.page.stages[this.page.stage], heats = stage.heats;
    this.plot.replaceChildren();
    this.select.parentElement.hidden = !heats.length;
    if (!heats.length) {
      this.plot.append(el("p", { class: "empty" }, "No data: this stage recorded no values by layer."));
      return;
    }
    this.select.replaceChildren(...heats.map((h) => el("option", {}, h.title)));
    const heat = heats.find((h) => h.title === this.title) ?? heats[0];
    this.select.value = heat.title;
    const first = stage.load?.first ?? 0, rows = heat.rows, columns = heat.x.length, lo = heat.low, hi = heat.high;
    const bytes = heat.bytes ??= decode(heat.data);
    const canvas = el("canvas", { role: "img", "aria-label": `${heat.title} by layer over time, from ${format(lo)} to ${format(hi)}` });
    canvas.style.height = `${clamp(rows * 16, 90, 340)}px`;
    const none = isDark() ? [35, 39, 45] : [239, 237, 232], anchors = valueRamp();
    paint(canvas, rows, columns, (r, c) => (bytes[r * columns + c] === 0 ? none : ramp(anchors, (bytes[r * columns + c] - 1) / 254)));
    const readout = el("p", { class: "readout" }), bar = el("canvas", { "aria-hidden": "true" });
    paint(bar, 1, 128, (_, c) => ramp(anchors, c / 127));
    canvas.onpointermove = (e) => {
      const r = canvas.getBoundingClientRect();
      const row = clamp(Math.floor((e.clientY - r.top) / r.height * rows), 0, rows - 1), c = clamp(Math.floor((e.clientX - r.left) / r.width * columns), 0, columns - 1);
      const v = bytes[row * columns + c];
      const value = v === 0 ? "no value" : `about ${format(+(lo + (hi - lo) * (v - 1) / 254).toPrecision(3))}`;
      readout.textContent = `step ${heat.x[c].toLocaleString("en")}, layer ${row + first}: ${value}`;
      this.page.setCursor(stage, heat.x[c]);
    };
    canvas.onpointerleave = () => this.page.setCursor(stage, null);
    this.plot.append(el("div", { class: "heat" }, canvas),
      el("div", { class: "heatx" }, el("span", {}, `step ${heat.x[0].toLocaleString("en")}`), el("span", {}, `layers ${first} to ${first + rows - 1}, downward`), el("span", {}, `step ${heat.x.at(-1).toLocaleString("en")}`)),
      el("div", { class: "scale" }, format(lo), bar, format(hi)), readout);
  }
}

function sparklines(stages) {
  document.querySelectorAll("[data-sparkline]").forEach((card, i) => {
    const curve = (stages[i].charts.reward ?? stages[i].charts.loss)?.curves[0];
    const box = card.querySelector(".spark");
    if (!curve) return;
    const y = curve.s ?? curve.y, seen = y.filter((v) => v !== null), lo = Math.min(...seen), hi = Math.max(...seen);
    const x0 = curve.x[0], x1 = curve.x.at(-1);
    const points = curve.x.map((x, k) => (y[k] === null ? null : [x1 > x0 ? (x - x0) / (x1 - x0) * 100 : 50, hi > lo ? 40 - (y[k] - lo) / (hi - lo) * 36 : 22])).filter(Boolean);
    const line = "M" + points.map((p) => p.map((v) => v.toFixed(2)).join(" ")).join("L");
    const root = svg("svg", { viewBox: "0 0 100 44", preserveAspectRatio: "none" });
    root.append(svg("path", { d: `${line}L${points.at(-1)[0]} 44L${points[0][0]} 44Z`, fill: "var(--accent)", opacity: 0.1 }));
    root.append(svg("path", { d: line, fill: "none", stroke: "var(--accent)", "stroke-width": 1.6, "vector-effect": "non-scaling-stroke", "stroke-linejoin": "round" }));
    box.append(root);
  });
}

const page = new Page(DATA.stages);
const press = (selector, chosen) => document.querySelectorAll(selector).forEach((b) => b.setAttribute("aria-pressed", String(b === chosen)));
for (const button of document.querySelectorAll("button[data-stage]"))
  button.onclick = () => { press("button[data-stage]", button); page.stage = +button.dataset.stage; page.draw(); };
for (const button of document.querySelectorAll("button[data-axis]")) {
  button.disabled = !DATA.stages.some((s) => s.axis[button.dataset.axis]);
  button.onclick = () => { press("button[data-axis]", button); page.axis = button.dataset.axis; page.draw(); };
}
for (const button of document.querySelectorAll("button[data-event]"))
  button.onclick = () => {
    const on = button.getAttribute("aria-pressed") !== "true";
    button.setAttribute("aria-pressed", String(on));
    document.querySelectorAll("#events tbody tr").forEach((row) => { if (row.dataset.kind === button.dataset.event) row.hidden = !on; });
  };
document.getElementById("unzoom").onclick = () => { page.zoom.clear(); document.getElementById("unzoom").hidden = true; page.draw(); };
document.getElementById("theme").onclick = () => { document.documentElement.dataset.theme = isDark() ? "light" : "dark"; page.panels.forEach((p) => p.draw()); };
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => page.panels.forEach((p) => p.draw()));
let width = innerWidth;
addEventListener("resize", () => { if (innerWidth !== width) { width = innerWidth; requestAnimationFrame(() => page.draw()); } });
sparklines(DATA.stages);
page.draw();
