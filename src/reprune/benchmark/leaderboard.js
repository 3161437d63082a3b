const DATA = JSON.parse(document.getElementById("data").textContent);
const ROWS = DATA.rows.map((values) =>
  Object.fromEntries(DATA.names.map((name, i) => [name, values[i]])));
const FILTERS = Object.keys(DATA.defaults);
const DEFAULTS = { ...DATA.defaults, sort: "", runs: "", points: "", record: "" };
const NONE = "none";
const MOST = 100;
const form = document.getElementById("filters");
let state, drawn, most = MOST;

function element(tag, attributes, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) if (value) made.setAttribute(name, value);
  made.append(...children);
  return made;
}

function number(value, digits = 1) {
  if (typeof value !== "number") return "–";
  const text = Math.abs(value).toFixed(digits);
  const [whole, rest] = text.split(".");
  const grouped = whole.replace(/\B(?=(\d{3})+$)/g, ",") + (rest ? `.${rest}` : "");
  return value < 0 && Number(text) ? `\u2212${grouped}` : grouped;
}

function grouped(rows, name) {
  const found = new Map();
  for (const row of rows) {
    if (!found.has(row[name])) found.set(row[name], []);
    found.get(row[name]).push(row);
  }
  return found;
}

// The state is the address; what is as at first is left out of it.

function read() {
  const given = new URLSearchParams(location.hash.slice(1));
  const found = Object.keys(DEFAULTS).map((name) => [name, given.get(name) ?? DEFAULTS[name]]);
  return Object.fromEntries(found);
}

function link(changes) {
  const wanted = Object.entries({ ...state, ...changes });
  return `#${new URLSearchParams(wanted.filter(([name, value]) => value !== DEFAULTS[name]))}`;
}

function go(changes) {
  history.pushState(null, "", link(changes));
  render();
}

// Sorting: missing values come last in both directions.

function order(items, value, direction) {
  const missing = (item) => value(item) === null;
  const compare = (a, b) => (a < b ? -1 : a > b ? 1 : 0);
  return [...items].sort((a, b) =>
    missing(a) - missing(b) || (missing(a) ? 0 : direction * compare(value(a), value(b))));
}

function sorting(kind) {
  const table = DATA.tables[state.task][kind];
  const known = table.columns.some(({ name }) => name === state[kind].replace("-", ""));
  const text = known ? state[kind] : table.sort;
  const direction = text.startsWith("-") ? -1 : 1;
  return { columns: table.columns, name: text.replace("-", ""), direction };
}

function markSorted(section, { name, direction }) {
  for (const head of section.querySelectorAll("th[data-name]")) {
    if (head.dataset.name !== name) head.removeAttribute("aria-sort");
    else head.setAttribute("aria-sort", direction < 0 ? "descending" : "ascending");
  }
}

function sortBy({ name, sort: kind }) {
  const now = sorting(kind);
  const column = now.columns.find((one) => one.name === name);
  const down = now.name === name ? now.direction > 0 : column.better === "higher";
  go({ [kind]: (down ? "-" : "") + name });
}

// The summary: the same means over models as in summary.py.

const mean = (values) => values.reduce((sum, value) => sum + value, 0) / values.length;

function cell(column, rows, models) {
  if (column.kind === "runs") return { value: rows.length };
  const done = rows.filter((row) => row.status === "done");
  if (column.kind === "failed") return { value: rows.length - done.length };
  if (column.kind === "models") {
    const value = grouped(done, "model_key").size;
    return { value, note: value < models ? `of ${models}` : "" };
  }
  const field = column.field || column.name;
  const counted = done.filter((row) => row.clean === column.clean && typeof row[field] === "number");
  if (!counted.length) return { value: null };
  const values = counted.map((row) => row[field]);
  if (column.kind === "worst") return { value: values.reduce((a, b) => Math.max(a, b)) };
  const byModel = [...grouped(counted, "model_key").values()];
  const means = byModel.map((runs) => mean(runs.map((row) => row[field])));
  const value = mean(means);
  if (column.kind === "share")
    return { value, note: `${values.filter((hit) => hit > 0).length} of ${values.length}` };
  const ends = [Math.min(...means), Math.max(...means)].map((end) => number(end, column.digits));
  return { value, note: column.spread && means.length > 1 ? ends.join(" to ") : "" };
}

function summarize(rows, columns) {
  const models = grouped(rows, "model_key").size;
  const found = order(grouped(rows, "entry"), ([entry]) => entry, 1);
  return found.map(([, runs]) => {
    const cells = columns.slice(1).map((column) => [column.name, cell(column, runs, models)]);
    const { method, detail, selection } = runs[0];
    return { method, detail, selection, runs, cells: Object.fromEntries(cells) };
  });
}

function methodCell(tag, { method, detail, selection }) {
  const wanted = { href: link({ method, record: "" }), title: "only this method" };
  const made = element(tag, { scope: tag === "th" && "row" }, element("a", wanted, method));
  if (selection !== "defender")
    made.append(" ", element("span", { class: `tag ${selection}` }, selection));
  if (tag === "th" && method === NONE) made.append(element("small", {}, "no defence: the baseline"));
  if (detail) made.append(element("small", {}, detail));
  return made;
}

function summaryRow(line, columns) {
  const cells = columns.slice(1).map(({ name, kind, digits }) => {
    const { value, note } = line.cells[name];
    const mark = value === null ? " missing" : kind === "failed" && value ? " bad" : "";
    const small = { class: kind === "models" && "partial" };
    return element("td", { class: `n${mark}` }, number(value, digits),
      ...(note ? [element("small", small, note)] : []));
  });
  const kind = line.method === NONE ? "baseline" : line.selection;
  return element("tr", { class: kind }, methodCell("th", line), ...cells);
}

function drawSummary(section, lines) {
  const sort = sorting("sort");
  const value = (line) => (sort.name === "method" ? line.method : line.cells[sort.name].value);
  const sorted = order(lines, value, sort.direction);
  const isBaseline = ({ method }) => method === NONE;
  const baselineFirst = [...sorted.filter(isBaseline), ...sorted.filter((line) => !isBaseline(line))];
  const body = baselineFirst.map((line) => summaryRow(line, sort.columns));
  section.querySelector("tbody").replaceChildren(...body);
  markSorted(section, sort);
}

// All runs.

function runRow(row, columns) {
  const made = element("tr", { class: `${row.selection} ${row.status}` });
  for (const [i, { name, kind, digits }] of columns.entries()) {
    const value = row[name];
    if (name === "model") {
      const opener = element("a", { href: link({ record: row.key }) }, value);
      made.append(element("th", { scope: "row" }, opener));
    } else if (name === "method") made.append(methodCell("td", row));
    else if (kind === "number") made.append(element("td", { class: "n" }, number(value, digits)));
    else made.append(element("td", { class: value === "failed" && "bad" }, value ?? "–"));
    if (name === "status" && value === "failed") {
      const rest = { class: "error", colspan: columns.length - i - 1 };
      made.append(element("td", rest, row.error ?? "no error was recorded"));
      break;
    }
  }
  return made;
}

function drawRuns(section, rows) {
  const sort = sorting("runs");
  const sorted = order(rows, (row) => row[sort.name], sort.direction);
  const body = sorted.slice(0, most).map((row) => runRow(row, sort.columns));
  section.querySelector("tbody").replaceChildren(...body);
  markSorted(section, sort);
  const more = section.querySelector(".more");
  more.replaceChildren();
  if (rows.length <= most) return;
  const button = element("button", { type: "button" }, `Show all ${number(rows.length, 0)}`);
  button.addEventListener("click", () => {
    most = Infinity;
    draw();
  });
  more.append(`The first ${most} runs are listed. `, button);
}

// Everything follows from the state; an opened record redraws nothing else.

function render() {
  state = read();
  if (!DATA.tables[state.task]) state.task = DEFAULTS.task;
  const wanted = link({ record: "" });
  if (wanted !== drawn) draw();
  drawn = wanted;
  if (state.record || dialog.open) showRecord(state.record);
}

function draw() {
  for (const name of FILTERS) form.elements[name].value = state[name];
  form.elements.points.checked = state.points === "runs";
  const fits = (row, names) =>
    names.every((name) => state[name] === "all" || row[name] === state[name]);
  const rows = ROWS.filter((row) => fits(row, FILTERS));
  const others = FILTERS.filter((name) => name !== "selection" && name !== "method");
  const baseline = ROWS.filter((row) => row.method === NONE && fits(row, others));
  const columns = DATA.tables[state.task].sort.columns;
  const lines = summarize([...new Set([...baseline, ...rows])], columns);
  count(rows);
  for (const section of document.querySelectorAll("section[data-task]")) {
    section.hidden = section.dataset.task !== state.task;
    if (section.hidden) continue;
    if (section.querySelector(".summary")) drawSummary(section, lines);
    else if (section.querySelector(".runs")) drawRuns(section, rows);
    else drawPlot(lines, state.points === "runs");
  }
}

function count(rows) {
  const all = ROWS.filter((row) => row.task === state.task).length;
  const failed = rows.filter((row) => row.status === "failed").length;
  const words = [`${number(rows.length, 0)} of ${number(all, 0)} ${state.task} runs`];
  if (failed) words.push(`${number(failed, 0)} of them failed`);
  if (!rows.length) words.push("none fits these filters");
  document.getElementById("count").textContent = words.join(", ");
}

for (const part of document.querySelectorAll(".js:not(section)")) part.hidden = false;
document.addEventListener("click", (event) => {
  const button = event.target.closest("button[data-sort]");
  if (button) sortBy(button.dataset);
});
document.addEventListener("change", ({ target }) => {
  const unchecked = target.type === "checkbox" && !target.checked;
  go({ [target.name]: unchecked ? "" : target.value });
});
let windowWidth = innerWidth;
addEventListener("resize", () => {
  if (innerWidth === windowWidth) return;
  windowWidth = innerWidth;
  draw();
});
addEventListener("hashchange", render);
render();
