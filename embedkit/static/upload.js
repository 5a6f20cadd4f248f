// Owns the dialog that sends a new scan and follows its computation.

import { getJson, postJson, sendFile } from "/static/api.js";
import { $, fillSelect, say } from "/static/dom.js";

const POLL_MS = 400;
const size = (bytes) => {
  if (bytes < 1e6) return `${Math.ceil(bytes / 1e3)} kB`;
  return bytes < 1e9 ? `${Math.round(bytes / 1e6)} MB` : `${(bytes / 1e9).toFixed(1)} GB`;
};
const wait = (milliseconds) => new Promise((resolve) => setTimeout(resolve, milliseconds));

export class UploadDialog {
  #files = [];
  #key = null;
  #busy = false;
  #limit;
  #onDone;

  /** `onDone(key, name)` is called when a scan can be looked at. */
  constructor({ views, limit, onDone }) {
    this.#limit = limit;
    this.#onDone = onDone;
    fillSelect($("upload-view"), views.map((view) => ({ value: view, label: view })));
    $("upload-view-field").hidden = views.length < 2;
    $("upload-limit").textContent = `At most ${size(limit)}.`;
    $("new-scan").disabled = !views.length;
    $("new-scan").title = views.length ? "" : "This index is over images of several channels: a single scan cannot be a query";
    $("new-scan").addEventListener("click", () => this.#open());
    $("files").addEventListener("change", () => this.#choose([...$("files").files]));
    $("upload-start").addEventListener("click", () => this.#run());
    $("upload-cancel").addEventListener("click", () => this.#cancel());
    $("upload").addEventListener("cancel", (event) => {
      event.preventDefault();
      this.#cancel();
    });
    this.#listenToDrops();
  }

  #open() {
    this.#choose([]);
    $("files").value = "";
    $("upload-patient").value = "";
    $("upload").showModal();
  }

  #listenToDrops() {
    const drop = $("drop");
    drop.addEventListener("dragover", (event) => {
      event.preventDefault();
      drop.classList.add("over");
    });
    drop.addEventListener("dragleave", () => drop.classList.remove("over"));
    drop.addEventListener("drop", (event) => {
      event.preventDefault();
      drop.classList.remove("over");
      this.#choose([...event.dataTransfer.files]);
    });
  }

  #choose(files) {
    if (this.#busy) return;
    this.#files = files;
    const total = files.reduce((sum, file) => sum + file.size, 0);
    const name = files.length === 1 ? files[0].name : `${files.length} files`;
    $("chosen").textContent = files.length ? `${name}, ${size(total)}` : "Choose files, or drop them here";
    const large = total > this.#limit;
    say($("upload-error"), large ? `${name} is larger than ${size(this.#limit)}, the limit that embedkit serve was started with` : "");
    $("upload-start").disabled = !files.length || large;
    $("upload-state").hidden = true;
  }

  async #run() {
    this.#setBusy(true);
    say($("upload-error"), "");
    try {
      const name = this.#files.length === 1 ? this.#files[0].name : `${this.#files.length} files`;
      await this.#send();
      const job = await this.#follow();
      if (job.state === "failed") throw new Error(job.error);
      if (job.state === "done") {
        $("upload").close();
        this.#onDone(job.upload, name);
      }
    } catch (error) {
      say($("upload-error"), error.message);
    } finally {
      this.#setBusy(false);
    }
  }

  async #send() {
    const sizes = this.#files.map((file) => file.size);
    const total = sizes.reduce((sum, each) => sum + each, 0);
    const view = $("upload-view").value || null;
    const patient = $("upload-patient").value.trim() || null;
    this.#key = (await postJson("/api/upload", { view, sizes, patient })).upload;
    let before = 0;
    for (const file of this.#files) {
      if (!this.#key) return;
      await sendFile(`/api/upload/${this.#key}/file`, file, (sent) => this.#progress(before + sent, total, "sending"));
      before += file.size;
    }
    if (this.#key) await postJson(`/api/upload/${this.#key}/start`);
  }

  async #follow() {
    while (this.#key) {
      const job = await getJson(`/api/upload/${this.#key}`);
      if (!["receiving", "running"].includes(job.state)) return job;
      const counted = job.total && job.stage === "computing tokens";
      const words = counted ? `${job.stage}: ${job.done} of ${job.total} slices` : job.stage;
      this.#progress(counted ? job.done : null, job.total, `${words}, ${Math.round(job.seconds)} s`);
      await wait(POLL_MS);
    }
    return { state: "cancelled" };
  }

  async #cancel() {
    const key = this.#key;
    this.#key = null;
    if (this.#busy && key) await postJson(`/api/upload/${key}/cancel`).catch(() => undefined);
    $("upload").close();
  }

  #setBusy(busy) {
    this.#busy = busy;
    for (const id of ["files", "upload-view", "upload-patient", "upload-start"]) $(id).disabled = busy;
    $("upload-state").hidden = !busy;
  }

  #progress(done, total, words) {
    const bar = $("upload-progress");
    if (done === null) bar.removeAttribute("value");
    else {
      bar.max = total || 1;
      bar.value = done;
    }
    $("upload-stage").textContent = words;
  }
}
