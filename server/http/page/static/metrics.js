// Reads the text format of Prometheus, as GET /metrics returns it.

const SAMPLE = /^([a-zA-Z_:][\w:]*)(?:\{(.*)\})? (\S+)/;
const LABEL = /([a-zA-Z_]\w*)="((?:[^"\\]|\\.)*)"/g;

/** All samples of one scrape. */
export class Metrics {
  #samples = new Map();

  constructor(text) {
    for (const line of text.split("\n")) {
      const found = SAMPLE.exec(line); // comments begin with "#" and do not match
      if (!found) continue;
      const labels = Object.fromEntries([...(found[2] ?? "").matchAll(LABEL)].map(([, name, value]) => [name, value]));
      const samples = this.#samples.get(found[1]) ?? [];
      samples.push({ labels, value: Number(found[3]) });
      this.#samples.set(found[1], samples);
    }
  }

  /** Returns the sum of the samples of a name whose labels include `labels`. */
  sum(name, labels = {}) {
    const wanted = Object.entries(labels);
    return (this.#samples.get(name) ?? [])
      .filter((sample) => wanted.every(([label, value]) => sample.labels[label] === value))
      .reduce((total, sample) => total + sample.value, 0);
  }

  /** Returns the quantile of a histogram, by linear interpolation in its bucket as Prometheus does, or null if it is
   * empty. */
  quantile(name, share) {
    const buckets = (this.#samples.get(`${name}_bucket`) ?? [])
      .map(({ labels, value }) => ({ bound: labels.le === "+Inf" ? Infinity : Number(labels.le), value }))
      .sort((a, b) => a.bound - b.bound);
    const total = buckets.at(-1)?.value ?? 0;
    if (!total) return null;
    const rank = share * total;
    let [below, floor] = [0, 0];
    for (const { bound, value } of buckets) {
      if (value >= rank) {
        return bound === Infinity ? floor : floor + ((bound - floor) * (rank - below)) / Math.max(value - below, 1);
      }
      [below, floor] = [value, bound];
    }
    return floor;
  }
}
