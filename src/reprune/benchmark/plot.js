// The plot: methods, whose labels keep out of each other's way, and on request single runs.

const PLOT = document.getElementById("plot");
const HIGH = 440, LEFT = 52, RIGHT = 24, TOP = 16, BOTTOM = 44;

function svg(tag, attributes, ...children) {
  const made = document.createElementNS(PLOT.namespaceURI, tag);
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  made.append(...children);
  return made;
}

function ticks(low, high) {
  const rough = (high - low) / 6;
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 5, 10].map((factor) => factor * power).find((one) => one >= rough);
  const found = [];
  for (let i = Math.ceil(low / step); i * step <= high; i++) found.push(i * step);
  return found;
}

function drawAxes(low, high, wide, x, y) {
  const axes = svg("g", { class: "axes" });
  const line = (ends, zero) => axes.append(svg("line", { ...ends, class: zero ? "zero" : "" }));
  const text = (place, words, anchor = "middle") =>
    axes.append(svg("text", { ...place, "text-anchor": anchor }, words));
  for (const value of ticks(low, high)) {
    line({ x1: x(value), x2: x(value), y1: TOP, y2: y(0) }, Math.abs(value) < 1e-9);
    text({ x: x(value), y: y(0) + 17 }, number(value, Number.isInteger(value) ? 0 : 1));
  }
  for (const value of [0, 20, 40, 60, 80, 100]) {
    line({ x1: LEFT, x2: wide - RIGHT, y1: y(value), y2: y(value) }, value === 0);
    text({ x: LEFT - 8, y: y(value) + 4 }, String(value), "end");
  }
  text({ x: (LEFT + wide - RIGHT) / 2, y: HIGH - 6 }, "CA drop, points (lower is better)");
  const turned = { transform: `translate(13 ${(TOP + y(0)) / 2}) rotate(-90)` };
  text(turned, "ASR after the repair, % (lower is better)");
  return axes;
}

function mark(kind, x, y, size) {
  const attributes = { class: `mark ${kind}` };
  if (kind === "baseline")
    return svg("rect", { ...attributes, x: x - size, y: y - size, width: 2 * size, height: 2 * size });
  const r = size + 1;
  if (kind === "oracle")
    return svg("path", { ...attributes, d: `M${x} ${y - r}l${r} ${r}l${-r} ${r}l${-r} ${-r}z` });
  return svg("circle", { ...attributes, cx: x, cy: y, r: size });
}

function drawPlot(lines, showRuns) {
  const wide = Math.max(PLOT.parentElement.clientWidth, 560);
  const points = lines
    .map((line) => ({
      line,
      drop: line.cells.ca_drop.value,
      asr: line.cells.asr.value,
      kind: line.method === NONE ? "baseline" : line.selection,
      runs: line.runs.filter((row) => !row.clean && row.ca_drop !== null && row.asr !== null),
    }))
    .filter(({ drop, asr }) => drop !== null && asr !== null);
  const drops = points.flatMap(({ drop, runs }) =>
    showRuns ? [drop, ...runs.map((row) => row.ca_drop)] : drop);
  const low = drops.reduce((a, b) => Math.min(a, b), 0) - 0.2;
  const high = drops.reduce((a, b) => Math.max(a, b), 2) * 1.06 + 0.2;
  const x = (drop) => LEFT + ((drop - low) / (high - low)) * (wide - LEFT - RIGHT);
  const y = (asr) => TOP + (1 - asr / 100) * (HIGH - TOP - BOTTOM);
  const taken = points.map(({ drop, asr }) => ({ x: x(drop) - 7, y: y(asr) - 7, w: 14, h: 14 }));
  const methods = points.map(({ line, drop, asr, kind, runs }) => {
    const name = kind === "baseline" ? "no defence" : line.method + (line.detail && ` (${line.detail})`);
    const said = (place, { cells }) =>
      `${place}: CA drop ${number(cells.ca_drop.value)}, ASR ${number(cells.asr.value)}`;
    const dots = runs.map((row) => {
      const cells = { ca_drop: { value: row.ca_drop }, asr: { value: row.asr } };
      return svg("a", { href: link({ record: row.key }) }, mark(kind, x(row.ca_drop), y(row.asr), 3),
        svg("title", {}, said(`${row.method}, ${row.model}, draw ${row.draw}`, { cells })));
    });
    const title = said(`${name}, ${line.selection}, models: ${line.cells.models.value}`, line);
    const point = svg("a", { href: link({ method: line.method, record: "" }), "aria-label": title },
      ...drawLabel(name, x(drop), y(asr), taken, wide), mark(kind, x(drop), y(asr), 5),
      svg("title", {}, title));
    const group = { class: showRuns ? "method all" : "method" };
    return svg("g", group, svg("g", { class: "dots" }, ...dots), point);
  });
  const size = { viewBox: `0 0 ${wide} ${HIGH}`, width: wide, height: HIGH };
  for (const [name, value] of Object.entries(size)) PLOT.setAttribute(name, value);
  PLOT.replaceChildren(drawAxes(low, high, wide, x, y), ...methods);
}

// A label at the nearest free place around its point; a thin line leads there from afar.
function drawLabel(name, x, y, taken, wide) {
  const text = name.length > 34 ? `${name.slice(0, 33)}…` : name;
  const [w, h] = [6.7 * text.length, 14];
  const places = [];
  for (const far of [10, 22, 38, 58, 82])
    for (const turn of [0, -0.45, 0.45, -0.9, 0.9, 1.35, -1.35])
      for (const side of [1, -1]) {
        const end = { x: x + side * far * Math.cos(turn), y: y + far * Math.sin(turn) };
        places.push({ x: side > 0 ? end.x : end.x - w, y: end.y - h / 2, w, h, far, end, side });
      }
  const shared = (a, b, from, size) =>
    Math.max(0, Math.min(a[from] + a[size], b[from] + b[size]) - Math.max(a[from], b[from]));
  const cost = (one) => {
    const outside = one.x < LEFT || one.x + w > wide || one.y < 0 || one.y + h > HIGH - BOTTOM;
    const overlaps = taken.map((other) => shared(one, other, "x", "w") * shared(one, other, "y", "h"));
    return overlaps.reduce((a, b) => a + b, 0) + (outside ? 1e6 : 0) + one.far / 100;
  };
  const best = places.reduce((a, b) => (cost(b) < cost(a) ? b : a));
  taken.push(best);
  const anchor = best.side > 0 ? "start" : "end";
  const label = svg("text", { x: best.end.x, y: best.y + 11, "text-anchor": anchor }, text);
  const lead = svg("line", { class: "lead", x1: x, y1: y, x2: best.end.x, y2: best.end.y });
  return best.far > 20 ? [lead, label] : [label];
}
