"use strict";
// Everything a run says reaches the page through textContent, never as markup.
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const make = (tag, text, className) => {
    const node = document.createElement(tag);
    if (text !== undefined) node.textContent = text;
    if (className) node.className = className;
    return node;
  };

  // ------------------------------------------------------------------ leaderboard
  const board = document.getElementById("board");
  const body = board.tBodies[0];
  const heads = [...board.tHead.rows[1].cells];
  const metrics = [...new Set(heads.map((head) => head.dataset.metric))];
  const MAIN = ["accuracy", "nll", "ece", "mutual_information"];
  const visible = new Set(data.top.length > 2 ? MAIN : metrics);

  const showColumns = () => {
    for (const cell of board.querySelectorAll("[data-metric]")) cell.hidden = !visible.has(cell.dataset.metric);
    for (const head of board.tHead.rows[0].querySelectorAll("th.task")) head.colSpan = Math.max(1, visible.size);
    // the rule between tasks goes with the first column that shows
    const first = metrics.find((metric) => visible.has(metric));
    for (const cell of board.querySelectorAll("[data-metric]")) cell.classList.toggle("first", cell.dataset.metric === first);
  };

  const choice = (parent, text, checked, change) => {
    const label = make("label");
    const box = make("input");
    box.type = "checkbox";
    box.checked = checked;
    box.addEventListener("change", () => change(box.checked));
    label.append(box, " " + text);
    parent.append(label);
  };

  const columns = document.getElementById("columns");
  for (const metric of metrics) {
    const text = heads.find((head) => head.dataset.metric === metric).textContent.trim();
    choice(columns, text, visible.has(metric), (on) => {
      if (on) visible.add(metric); else visible.delete(metric);
      showColumns();
    });
  }
  columns.hidden = false;

  const hiddenKinds = new Set();
  const showKinds = () => {
    for (const row of body.rows) row.hidden = hiddenKinds.has(row.dataset.kind);
  };
  const kinds = [...new Set([...body.rows].map((row) => row.dataset.kind))];
  if (kinds.length > 1) {
    const parent = document.getElementById("kinds");
    for (const kind of kinds) {
      choice(parent, kind, true, (on) => {
        if (on) hiddenKinds.delete(kind); else hiddenKinds.add(kind);
        showKinds();
      });
    }
    parent.hidden = false;
  }

  const childrenOf = (row) => {
    const children = [];
    for (let next = row.nextElementSibling; next && next.classList.contains("subtask"); next = next.nextElementSibling) children.push(next);
    return children;
  };

  const sortBy = (index) => {
    const head = heads[index];
    const descending = head.getAttribute("aria-sort") !== "descending";
    for (const other of heads) other.removeAttribute("aria-sort");
    head.setAttribute("aria-sort", descending ? "descending" : "ascending");
    const value = (row) => {
      const cell = row.cells[index + 1];
      return "value" in cell.dataset ? Number(cell.dataset.value) : NaN;
    };
    const rows = [...body.rows].filter((row) => !row.classList.contains("subtask")).map((row) => [row, childrenOf(row)]);
    rows.sort(([a], [b]) => {
      const x = value(a), y = value(b);
      if (Number.isNaN(x) || Number.isNaN(y)) return Number.isNaN(x) - Number.isNaN(y);
      return descending ? y - x : x - y;
    });
    for (const [row, below] of rows) body.append(row, ...below);
  };
  heads.forEach((head, index) => head.querySelector("button").addEventListener("click", () => sortBy(index)));

  const subtaskRow = (subtask, values) => {
    const row = make("tr", undefined, "subtask");
    row.dataset.kind = values.kind;
    const name = make("th", `${subtask.task} (${subtask.n})`, "name");
    name.scope = "row";
    row.append(name);
    for (const top of data.top) {
      for (const metric of metrics) {
        const cell = make("td");
        cell.dataset.metric = metric;
        if (subtask.parents.includes(top)) {
          const { display, interval, best } = values.cells[metric];
          cell.append(make("span", display, "value"));
          if (interval) cell.append(make("span", interval, "interval"));
          if (best) cell.classList.add("best");
        }
        row.append(cell);
      }
    }
    return row;
  };

  if (data.subtasks.length) {
    for (const row of [...body.rows]) {
      const belongs = (values) => values.run === Number(row.dataset.entry) && values.kind === row.dataset.kind;
      const below = () => data.subtasks.flatMap((subtask) => subtask.rows
        .filter(belongs)
        .map((values) => subtaskRow(subtask, values)));
      if (!data.subtasks.some((subtask) => subtask.rows.some(belongs))) continue;
      const button = make("button", "+", "expand");
      button.type = "button";
      button.setAttribute("aria-expanded", "false");
      button.setAttribute("aria-label", `Tasks of ${row.cells[0].textContent}`);
      button.addEventListener("click", () => {
        const open = button.getAttribute("aria-expanded") === "true";
        if (open) childrenOf(row).forEach((child) => child.remove());
        else row.after(...below());
        button.setAttribute("aria-expanded", String(!open));
        button.textContent = open ? "+" : "−";
        showColumns();
      });
      row.cells[0].prepend(button);
    }
  }
  showColumns();

  // figures far down the page are decoded when they come near, but paper needs them all
  window.addEventListener("beforeprint", () => {
    for (const image of document.images) image.loading = "eager";
  });

  // ------------------------------------------------------------------ documents
  const PAGE = 20;
  const argmax = (percent) => percent.indexOf(Math.max(...percent));
  const isRight = (d) => d.golds.includes(argmax(d.percent));
  const isWrong = (d) => d.golds.length > 0 && !isRight(d);
  const confidence = (d) => Math.max(...d.percent);
  const orders = [(d) => d.entropy, confidence, (d) => d.information];
  const byId = (id) => document.getElementById(id);
  const filters = { run: byId("filter-run"), task: byId("filter-task"), reason: byId("filter-reason"), answer: byId("filter-answer") };
  const option = (select, value, text) => {
    const node = make("option", text);
    node.value = value;
    select.append(node);
  };
  option(filters.run, "", "all");
  [...new Set(data.documents.map((d) => d.run))].forEach((entry) => option(filters.run, entry, data.runs[entry]));
  option(filters.task, "", "all");
  [...new Set(data.documents.map((d) => d.task))].sort().forEach((task) => option(filters.task, task, task));
  data.reasons.forEach((reason, index) => {
    if (data.documents.some((d) => d.reasons.includes(index))) option(filters.reason, index, reason);
  });

  let shown = [], page = 0;
  const card = (d) => {
    const item = make("li");
    const right = isWrong(d) ? "wrong" : isRight(d) ? "right" : "gold unknown";
    item.append(make("div", `${data.runs[d.run]} · ${d.task} · document ${d.number} · ${right} · entropy ${d.entropy.toFixed(3)} · MI ${d.information.toFixed(3)} nats`, "where"));
    item.append(make("div", d.question || "(the samples file holds no text)", "question"));
    const answers = make("div", undefined, "answers");
    d.percent.forEach((percent, c) => {
      const text = d.choices[c] || `choice ${c + 1}`;
      answers.append(make("div", d.golds.includes(c) ? `✓ ${text}` : text, d.golds.includes(c) ? "text gold" : "text"));
      const bar = make("div", undefined, "bar");
      const length = make("i");
      length.style.width = `${(percent * 0.055).toFixed(2)}rem`;
      bar.append(length, percent.toFixed(1));
      answers.append(bar, make("div", d.members.length > 1 ? d.members.map((m) => m[c].toFixed(0)).join(" · ") : "", "members"));
    });
    item.append(answers);
    return item;
  };
  const draw = () => {
    const pages = Math.max(1, Math.ceil(shown.length / PAGE));
    byId("cards").replaceChildren(...shown.slice(page * PAGE, (page + 1) * PAGE).map(card));
    byId("count").textContent = `${shown.length} of ${data.documents.length} documents`;
    byId("page").textContent = `page ${page + 1} of ${pages}`;
    byId("previous").disabled = page === 0;
    byId("next").disabled = page + 1 >= pages;
  };
  const filter = () => {
    const reason = Number(filters.reason.value);
    shown = data.documents.filter((d) =>
      (!filters.run.value || d.run === Number(filters.run.value)) &&
      (!filters.task.value || d.task === filters.task.value) &&
      d.reasons.includes(reason) &&
      (!filters.answer.value || (filters.answer.value === "right" ? isRight(d) : isWrong(d))));
    shown.sort((a, b) => orders[reason](b) - orders[reason](a));
    page = 0;
    draw();
  };
  for (const select of Object.values(filters)) select.addEventListener("change", filter);
  byId("previous").addEventListener("click", () => { page -= 1; draw(); });
  byId("next").addEventListener("click", () => { page += 1; draw(); });
  byId("filters").hidden = false;
  byId("pages").hidden = false;
  filter();
})();
