// Owns talking to the server: every request goes to the page's own origin; an error's message is what the server says.

export class ServerError extends Error {}

async function answer(response) {
  if (response.ok) return response;
  let message = `the server answered ${response.status}`;
  try {
    message = (await response.json()).error || message;
  } catch {
    // not JSON: the status has to do
  }
  throw new ServerError(message);
}

function address(path, parameters) {
  const query = new URLSearchParams();
  for (const [name, value] of Object.entries(parameters)) {
    if (value !== undefined && value !== null && value !== "") query.set(name, value);
  }
  const text = query.toString();
  return text ? `${path}?${text}` : path;
}

async function ask(url, options) {
  try {
    return await answer(await fetch(url, options));
  } catch (error) {
    if (error instanceof ServerError || error.name === "AbortError") throw error;
    throw new ServerError("the server does not answer; is embedkit serve still running?");
  }
}

export async function getJson(path, parameters = {}, signal = undefined) {
  return (await ask(address(path, parameters), { signal })).json();
}

export async function getBytes(path, parameters = {}, signal = undefined) {
  return new Uint8Array(await (await ask(address(path, parameters), { signal })).arrayBuffer());
}

export async function postJson(path, value = {}) {
  return (await ask(path, { method: "POST", body: JSON.stringify(value) })).json();
}

/** Sends one file as it is; `onProgress` hears of the bytes sent. */
export function sendFile(path, file, onProgress) {
  return new Promise((resolve, reject) => {
    const request = new XMLHttpRequest();
    request.open("POST", address(path, { name: file.name }));
    request.upload.onprogress = (event) => onProgress(event.loaded);
    request.onload = () => {
      if (request.status < 300) return resolve();
      let message = `the server answered ${request.status}`;
      try {
        message = JSON.parse(request.responseText).error || message;
      } catch {
        // not JSON: the status has to do
      }
      return reject(new ServerError(message));
    };
    request.onerror = () => reject(new ServerError("the upload broke off; is embedkit serve still running?"));
    request.send(file);
  });
}

/** Runs the newest call alone: an older one still under way is aborted, and its result is never seen. */
export class Latest {
  #controller = null;

  async run(work) {
    this.#controller?.abort();
    const controller = new AbortController();
    this.#controller = controller;
    try {
      const value = await work(controller.signal);
      return controller.signal.aborted ? undefined : value;
    } catch (error) {
      if (error.name === "AbortError" || controller.signal.aborted) return undefined;
      throw error;
    }
  }
}
