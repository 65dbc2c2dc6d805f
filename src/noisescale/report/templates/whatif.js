"use strict";
// The what-if panel. whatIf() is pure: the same rule as the Python code, on the embedded record.

const TIE = 0.05; // sizes within 5 % of the least time count as ties; the smallest is taken
const MAX_ROWS = 20; // as in the Python code
const NEARBY = Math.sqrt(1.5); // how far a row may lie from its round number, as in the Python code
const SAME_SPEED = 0.05; // seconds per example that count as equal, as in the Python code

function sameDevices(a, b) {
  const sorted = (list) => [...new Set(list)].sort((x, y) => x - y).join();
  return sorted(a) === sorted(b);
}

// With the devices of the report: its own rows. With others: rows made as Python makes them, of
// measured micro-batches; averaging between devices is taken as free, for it was not measured.
function candidates(advice, devices) {
  if (sameDevices(devices, advice.devices)) {
    return advice.table.map((row) => ({
      global_batch_size: row.global_batch_size, micro_batch_size: row.micro_batch_size,
      accumulation: row.accumulation, replicas: row.replicas, seconds_per_step: row.seconds_per_step,
    }));
  }
  const counts = [...new Set(devices)];
  const blocks = advice.speed.points.flatMap((point) => counts.map((replicas) => ({
    micro: point.micro_batch_size, replicas, seconds: point.seconds_per_step,
    size: point.micro_batch_size * replicas,
  })));
  const most = advice.recipe.dataset_size || Math.max(...advice.table.map((row) => row.global_batch_size));
  const smallest = Math.min(...blocks.map((block) => block.size));
  const sizes = new Set([smallest]);
  for (const goal of goals(smallest, most, advice.limits.critical_batch)) sizes.add(near(goal, blocks, most));
  return [...sizes].filter((size) => size <= most).sort((a, b) => a - b).map((size) => fastest(size, blocks));
}

// Round global batch sizes: powers of two, then their 3/2, those nearest the critical batch.
function goals(smallest, most, critical) {
  const wanted = critical.point || critical.low || Math.sqrt(smallest * most);
  const distance = (goal) => Math.abs(Math.log(goal / wanted));
  const list = [];
  for (const factor of [1, 3]) {
    const inside = [];
    for (let power = 1; power <= most; power *= 2) {
      const goal = factor * power;
      if (goal > smallest && goal < most * NEARBY) inside.push(goal);
    }
    inside.sort((a, b) => distance(a) - distance(b));
    list.push(...inside.slice(0, Math.max(0, MAX_ROWS - 1 - list.length)));
  }
  return list;
}

// The fastest way to make exactly this size; of equals the fewest devices, then the fewest passes.
function fastest(size, blocks) {
  let best = null;
  for (const block of blocks.filter((one) => size % one.size === 0)) {
    const accumulation = size / block.size;
    const row = {
      global_batch_size: size, micro_batch_size: block.micro, accumulation,
      replicas: block.replicas, seconds_per_step: accumulation * block.seconds,
    };
    const better = best === null || row.seconds_per_step < best.seconds_per_step ||
      (row.seconds_per_step === best.seconds_per_step && (row.replicas < best.replicas ||
        (row.replicas === best.replicas && accumulation < best.accumulation)));
    if (better) best = row;
  }
  return best;
}

// The size nearest to a goal among those about as fast per example as any near it.
function near(goal, blocks, most) {
  const sizes = new Set();
  for (const block of blocks) {
    const passes = Math.floor(goal / block.size);
    for (const size of [block.size * passes, block.size * (passes + 1)]) {
      if (size > goal / NEARBY && size < goal * NEARBY && size <= most) sizes.add(size);
    }
  }
  const list = [...sizes].map((size) => ({ size, pace: fastest(size, blocks).seconds_per_step / size }));
  const limit = (1 + SAME_SPEED) * Math.min(...list.map((one) => one.pace));
  const distance = (one) => Math.abs(Math.log(one.size / goal));
  const quick = list.filter((one) => one.pace <= limit);
  quick.sort((a, b) => distance(a) - distance(b) || a.size - b.size);
  return quick.length ? quick[0].size : Math.min(...blocks.map((block) => block.size));
}

// The allowed row of least time; among ties the smallest global batch. Index, or null.
function recommend(rows) {
  const allowed = rows.filter((row) => row.allowed && row.effort !== null);
  if (!allowed.length) return null;
  const least = Math.min(...allowed.map((row) => row.effort));
  return rows.indexOf(allowed.find((row) => row.effort <= (1 + TIE) * least));
}

// settings: devices (list), maxWaste, price per device-hour or null, and a run that is known:
// knownSteps to the target at a global batch of knownBatch, or null.
function whatIf(advice, settings) {
  const critical = advice.limits.critical_batch;
  const judged = critical.low;
  const central = critical.point === null ? judged : critical.point;
  const stepsMin = central !== null && settings.knownSteps && settings.knownBatch
    ? settings.knownSteps / (1 + central / settings.knownBatch) : null;
  const rows = candidates(advice, settings.devices).map((row) => {
    const size = row.global_batch_size;
    const steps = central === null ? null : 1 + central / size;
    const worst = judged === null ? null : 1 + size / judged;
    const effort = steps === null ? null : steps * row.seconds_per_step;
    const seconds = effort === null ? null : effort * (stepsMin === null ? 1000 : stepsMin);
    const money = seconds === null || settings.price === null
      ? null : settings.price * row.replicas * seconds / 3600;
    return {
      ...row, effort, seconds, money, examples_ratio_high: worst,
      steps_ratio: critical.point === null ? null : steps,
      examples_ratio: critical.point === null ? null : 1 + size / central,
      allowed: worst !== null && worst <= settings.maxWaste * (1 + 1e-12),
    };
  });
  const timed = rows.filter((row) => row.effort !== null);
  const least = Math.min(...timed.map((row) => row.effort));
  const cheapest = Math.min(...timed.map((row) => row.effort * row.replicas));
  for (const row of rows) {
    row.relative_time = row.effort === null ? null : row.effort / least;
    row.relative_cost = row.effort === null ? null : row.effort * row.replicas / cheapest;
  }
  return { rows, recommended: recommend(rows), stepsMin };
}

function number(value, digits = 3) {
  if (value === null || !isFinite(value)) return "?";
  if (value === 0) return "0";
  const rounded = Number(value.toPrecision(digits));
  const power = Math.floor(Math.log10(Math.abs(rounded)));
  if (power >= 12 || power < -4) return rounded.toExponential(digits - 1);
  const decimals = Math.max(0, digits - 1 - power);
  return rounded.toLocaleString("en-US", { minimumFractionDigits: decimals, maximumFractionDigits: decimals });
}

function duration(seconds) {
  if (seconds === null) return "?";
  if (seconds < 1e-3) return number(seconds * 1e6) + " µs";
  if (seconds < 1) return number(seconds * 1e3) + " ms";
  if (seconds < 59.95) return number(seconds) + " s";
  const minutes = Math.floor(Math.round(seconds) / 60);
  if (minutes < 60) return minutes + " min " + (Math.round(seconds) % 60) + " s";
  return Math.floor(minutes / 60).toLocaleString("en-US") + " h " + (minutes % 60) + " min";
}

function whole(value) { return value.toLocaleString("en-US"); }

function plural(value, noun) { return whole(value) + " " + noun + (value === 1 ? "" : "s"); }

// At most about 16 rows: the recommended one, what surrounds it, and the ends of the useful range.
function shown(result) {
  const middle = result.recommended;
  const useful = result.rows.map((row, index) => index).filter((index) => {
    const row = result.rows[index];
    return index === middle || row.relative_time === null || row.relative_time <= 10;
  });
  const stride = Math.max(1, Math.ceil(useful.length / 14));
  return useful.filter((index, place) => place % stride === 0 || place === useful.length - 1 ||
    (middle !== null && Math.abs(index - middle) <= 1));
}

function ratio(value) { return value === null ? "?" : number(value) + "×"; }

function columns(result, settings, unit) {
  const known = result.stepsMin !== null;
  const central = result.rows.some((row) => row.steps_ratio !== null);
  const list = [
    ["global batch (" + unit + ")", (row) => whole(row.global_batch_size)],
    ["micro × accumulation × replicas",
      (row) => [row.micro_batch_size, row.accumulation, row.replicas].map(whole).join(" × ")],
    [unit + " over fewest (at worst)", (row) => (central ? ratio(row.examples_ratio) + " " : "") +
      "(" + ratio(row.examples_ratio_high) + ")"],
    ["time over best", (row) => ratio(row.relative_time)],
    ["device-time over cheapest", (row) => ratio(row.relative_cost)],
  ];
  if (central) list.splice(2, 0, ["steps over fewest", (row) => ratio(row.steps_ratio)]);
  if (known) list.push(["time to target", (row) => duration(row.seconds)]);
  if (settings.price !== null) {
    list.push([known ? "cost to target" : "cost per 1,000 Smin", (row) => number(row.money)]);
  }
  return list;
}

function fill(table, result, settings, unit) {
  const list = columns(result, settings, unit);
  const cells = (tag, texts) => {
    const row = document.createElement("tr");
    for (const text of texts) {
      const cell = document.createElement(tag);
      cell.textContent = text;
      row.append(cell);
    }
    return row;
  };
  table.replaceChildren(cells("th", list.map((column) => column[0])));
  for (const index of shown(result)) {
    const row = cells("td", list.map((column) => column[1](result.rows[index])));
    if (index === result.recommended) row.className = "chosen";
    else if (!result.rows[index].allowed) row.className = "refused";
    table.append(row);
  }
}

function answer(advice, result) {
  if (result.recommended === null) {
    return advice.limits.critical_batch.low === null
      ? "No recommendation: no lower end of the critical batch exists."
      : "No size stays within this waste.";
  }
  const row = result.rows[result.recommended];
  const before = advice.recommended;
  const same = before && ["global_batch_size", "micro_batch_size", "accumulation", "replicas"]
    .every((name) => before[name] === row[name]);
  return "Global batch of " + whole(row.global_batch_size) + " " + advice.unit + " = micro-batch " +
    whole(row.micro_batch_size) + " × accumulation " + whole(row.accumulation) + " × " +
    plural(row.replicas, "device") + (same ? ", as recommended above." : ".");
}

function note(advice, result, settings) {
  const parts = [];
  if (result.rows.some((row) => row.replicas > 1)) {
    parts.push("Averaging between devices was not measured and is taken as free: real times are longer.");
  }
  if (result.stepsMin !== null) {
    parts.push("The run you know puts the fewest possible steps Smin at " + number(result.stepsMin) +
      ", " + (advice.limits.critical_batch.point === null
      ? "at the lower end of the critical batch." : "at the central estimate of the critical batch."));
  } else if (settings.price !== null) {
    parts.push("Steps to the target are not known, so the cost is stated for each 1,000 of the fewest" +
      " possible steps Smin. Enter a run you know for the cost to the target, in the currency of the price.");
  }
  if (advice.limits.critical_batch.point === null) {
    parts.push("Only the lower end of the critical batch is known: times are compared there.");
  }
  parts.push("Grey rows may waste more than accepted. Times and costs share the bands of the table above.");
  return parts.join(" ");
}

// Reads one field; undefined means that it cannot be used.
function read(input) {
  if (input.name === "devices") {
    const list = input.value.split(/[\s,;]+/).filter(Boolean).map(Number);
    const good = list.length && list.length <= 32 && list.every((n) => Number.isInteger(n) && n >= 1 && n <= 1e6);
    return good ? list : undefined;
  }
  if (input.value === "") return input.validity.badInput || input.name === "waste" ? undefined : null;
  const value = Number(input.value);
  if (input.name === "waste") return isFinite(value) && value > 1 ? value : undefined;
  return isFinite(value) && value >= (input.name === "price" ? 0 : 1) ? value : undefined;
}

function bind() {
  const advice = JSON.parse(document.getElementById("advice").textContent);
  const panel = document.getElementById("whatif");
  if (!panel || !advice.table.length) return;
  const form = panel.querySelector("form").elements;
  form.devices.value = advice.devices.join(", ");
  form.waste.value = advice.max_waste;
  form.batch.value = advice.recipe.batch_size;
  const update = () => {
    const value = {};
    let good = true;
    for (const name of ["devices", "waste", "price", "steps", "batch"]) {
      value[name] = read(form[name]);
      form[name].classList.toggle("bad", value[name] === undefined);
      good = good && value[name] !== undefined;
    }
    if (!good) return;
    const settings = {
      devices: value.devices, maxWaste: value.waste, price: value.price,
      knownSteps: value.steps, knownBatch: value.batch,
    };
    const result = whatIf(advice, settings);
    fill(document.getElementById("whatif-table"), result, settings, advice.unit);
    document.getElementById("whatif-answer").textContent = answer(advice, result);
    document.getElementById("whatif-note").textContent = note(advice, result, settings);
  };
  panel.hidden = false;
  panel.addEventListener("input", update);
  update();
}

if (typeof document !== "undefined") bind();
if (typeof module !== "undefined") module.exports = { whatIf, number, duration };
