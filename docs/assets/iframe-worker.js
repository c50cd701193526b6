// A browser starts no worker from file://. There, the script of a worker runs in a hidden frame instead,
// so that the search works in a site that is opened from a disk.
(() => {
  if (location.protocol !== "file:") return;

  // In the frame: loads scripts one after the other, as `importScripts` of a worker.
  function load(...urls) {
    return urls.reduce((before, url) => before.then(() => new Promise((done, failed) => {
      const script = document.createElement("script");
      script.src = url;
      script.onload = done;
      script.onerror = () => failed(new Error("cannot load " + url));
      document.body.appendChild(script);
    })), Promise.resolve());
  }

  window.Worker = class extends EventTarget {
    constructor(url) {
      super();
      this.onmessage = null;
      const frame = document.createElement("iframe");
      frame.hidden = true;
      document.body.appendChild(frame);
      this.inner = frame.contentWindow;
      this.listen = (event) => {
        if (event.source !== this.inner) return;
        const message = new MessageEvent("message", { data: event.data });
        this.dispatchEvent(message);
        if (this.onmessage) this.onmessage(message);
      };
      addEventListener("message", this.listen);
      this.ready = new Promise((done) => frame.addEventListener("load", done, { once: true }));
      const page = this.inner.document;
      page.open();
      page.write(
        "<body><script>postMessage = (data) => parent.postMessage(data, '*'); importScripts = " + load +
        ";</script><script src=\"" + url + "\"></script></body>"
      );
      page.close();
      this.frame = frame;
    }

    postMessage(data) {
      this.ready.then(() => this.inner.dispatchEvent(new MessageEvent("message", { data: structuredClone(data) })));
    }

    terminate() {
      removeEventListener("message", this.listen);
      this.frame.remove();
    }
  };
})();
