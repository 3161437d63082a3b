// One record, whole, in a dialog.

const dialog = document.getElementById("record");

function shown(value) {
  if (value === null || value === "") return "–";
  if (typeof value !== "object") return String(value);
  const plain = (one) => one === null || typeof one !== "object";
  if (Array.isArray(value) && value.every(plain)) return value.map(shown).join(", ") || "–";
  const entries = Object.entries(value);
  return entries.length ? pairs(entries.map(([name, one]) => [name, shown(one)])) : "–";
}

function pairs(entries) {
  const rows = entries.map(([name, part]) =>
    element("tr", {}, element("th", { scope: "row" }, name), element("td", {}, part)));
  return element("table", { class: "pairs" }, element("tbody", {}, ...rows));
}

function rates(before, after) {
  const columns = ["%", "before", "after"].map((text, i) =>
    element("th", { scope: "col", class: i && "n" }, text));
  const rows = ["ca", "asr", "ra"].map((name) =>
    element("tr", {}, element("th", { scope: "row" }, name.toUpperCase()),
      ...[before, after].map((found) => element("td", { class: "n" }, number(found[name], 2)))));
  const head = element("thead", {}, element("tr", {}, ...columns));
  return element("table", { class: "slim" }, head, element("tbody", {}, ...rows));
}

function recordParts(record, row) {
  const { error, notes, before, after, figures, experiment, made, ...rest } = record;
  const parts = [];
  if (record.status === "failed") {
    const text = `failed: ${error ?? "no error was recorded"}`;
    parts.push(element("pre", { class: "error" }, text));
  }
  const add = (title, part) => parts.push(element("h3", {}, title), part);
  if (row.task === "removal") {
    add("Before and after", rates(before, after));
    add("From these", pairs([
      ["CA drop, points", number(row.ca_drop, 2)],
      ["DER, %", number(row.der, 2)],
      ["ASR of a clean model, %", number(row.floor, 2)],
      ["excess ASR, points", number(row.excess, 2)],
    ]));
  }
  add("Figures", shown(figures));
  const list = notes.map((note) => element("li", {}, note));
  add("Notes", list.length ? element("ul", {}, ...list) : "–");
  add("Experiment", shown(experiment));
  add("How it was made", shown({ ...rest, ...made }));
  return parts;
}

function showRecord(key) {
  if (!key) return dialog.close();
  const record = DATA.records[key];
  const row = ROWS.find((one) => one.key === key);
  const close = element("button", { type: "button", class: "close", "aria-label": "Close" }, "✕");
  close.addEventListener("click", () => dialog.close());
  const words = record ? "Record " : "No such record: ";
  const title = element("h2", { id: "record-title" }, words, element("code", {}, key));
  dialog.replaceChildren(close, title);
  if (record)
    dialog.append(methodCell("p", row), element("p", {}, row.model), ...recordParts(record, row));
  if (!dialog.open) dialog.showModal();
  dialog.scrollTop = 0;
}

dialog.addEventListener("close", () => {
  if (state.record) go({ record: "" });
});
dialog.addEventListener("click", (event) => {
  if (event.target === dialog) dialog.close();
});
