// Replies on their way to the socket.
//
// Many goroutines have replies, one at a time writes: who finds nobody writing
// becomes the writer and goes on until nothing is left, for itself and for all
// who came meanwhile. So nobody waits for the socket but the writer, and what
// comes together is written together, by one system call.

package intercept

import (
	"net"
	"sync"
	"sync/atomic"
	"time"
)

// maxSmall is how many bytes of replies without data may wait before the reader
// takes no more requests that would be answered by a worker. Workers never wait for
// it: what they have in hand comes on top.
const maxSmall = 64 << 10

// stretch is how many bytes a client must take within the sender's timeout.
const stretch = 64 << 10

// sender owns the writing side of a connection. Its methods may be called from
// any goroutine.
type sender struct {
	conn    net.Conn
	apart   bool          // large data is written alone
	timeout time.Duration // for a stretch; 0: none
	last    atomic.Bool   // lastWords was called: the limit is for all
	dead    atomic.Bool   // a write has failed: nobody gets replies any more

	// mu protects the fields below. Never held across I/O.
	mu    sync.Mutex
	idle  sync.Cond // busy became false
	ebbed sync.Cond // small became shorter
	busy  bool      // somebody writes
	queue []*buffer // to be sent, in this order
	small []byte    // replies without data, sent after the queue

	// The writer's: what it is sending, and room for the next turn.
	sentQueue []*buffer
	sentSmall []byte
	parts     [][]byte
	vec       net.Buffers
}

func newSender(conn net.Conn, timeout time.Duration) *sender {
	w := &sender{conn: conn, timeout: timeout}
	_, w.apart = conn.(*net.UnixConn)
	w.idle.L, w.ebbed.L = &w.mu, &w.mu
	return w
}

// send writes what the buffers hold, in order, and frees them, now or as soon
// as the present writer gets to it. It waits only if it becomes the writer.
func (w *sender) send(bufs ...*buffer) {
	w.mu.Lock()
	w.queue = append(w.queue, bufs...)
	w.writeLocked()
}

// sendSmall is send for a copy of p, a few bytes. It goes out after what was
// sent before it, not before what is sent later: a reply in several chunks
// ends with it.
func (w *sender) sendSmall(p []byte) {
	w.mu.Lock()
	w.small = append(w.small, p...)
	w.writeLocked()
}

// flooded says that more than maxSmall bytes of small replies wait.
func (w *sender) flooded() bool {
	w.mu.Lock()
	defer w.mu.Unlock()
	return len(w.small) > maxSmall
}

// waitForEbb returns when flooded would return false.
func (w *sender) waitForEbb() {
	w.mu.Lock()
	defer w.mu.Unlock()
	for len(w.small) > maxSmall {
		w.ebbed.Wait()
	}
}

// writeLocked makes the caller the writer if there is none, and unlocks.
func (w *sender) writeLocked() {
	if w.busy {
		w.mu.Unlock()
		return
	}
	w.busy = true
	w.drainLocked()
	w.mu.Unlock()
}

// drainLocked writes until nothing is left; the caller has set busy.
func (w *sender) drainLocked() {
	for len(w.queue) > 0 || len(w.small) > 0 {
		queue, small := w.queue, w.small
		w.queue, w.small = w.sentQueue[:0], w.sentSmall[:0]
		w.ebbed.Broadcast()
		w.mu.Unlock()

		if !w.dead.Load() {
			w.write(queue, small)
		}
		for _, b := range queue {
			b.free()
		}
		clear(queue)

		w.mu.Lock()
		w.sentQueue, w.sentSmall = queue, small
	}
	w.busy = false
	w.idle.Signal()
}

// write sends the parts of all the buffers and then small.
func (w *sender) write(queue []*buffer, small []byte) {
	parts := w.parts[:0]
	for _, b := range queue {
		parts = append(parts, b.parts...)
	}
	if len(small) > 0 {
		parts = append(parts, small)
	}
	w.parts = parts

	var err error
	for rest := parts; len(rest) > 0 && err == nil; {
		n := w.together(rest)
		if n == 1 {
			err = w.put(rest[0])
		} else {
			w.vec = rest[:n] // WriteTo moves the slice that it is given
			_, err = w.vec.WriteTo(w.conn)
		}
		rest = rest[n:]
	}
	clear(parts)
	w.check(err)
}

// together is how many of the parts are written by one system call. On a unix
// socket large data is written alone: the kernel copies a call's bytes to one
// stream of pages, so after a header no byte of the data would keep its place in
// the page, and both copies, in and out, would be slower.
func (w *sender) together(parts [][]byte) int {
	if w.timeout > 0 {
		return 1
	}
	if !w.apart {
		return len(parts)
	}
	for n, p := range parts {
		if len(p) >= apartSize {
			return max(n, 1)
		}
	}
	return len(parts)
}

// put writes p, in stretches where each has a time limit of its own: a client that
// takes its replies slowly does take them.
func (w *sender) put(p []byte) error {
	for len(p) > 0 {
		n := len(p)
		if w.timeout > 0 && !w.last.Load() {
			n = min(n, stretch)
			w.conn.SetWriteDeadline(time.Now().Add(w.timeout))
		}
		if _, err := w.conn.Write(p[:n]); err != nil {
			return err
		}
		p = p[n:]
	}
	return nil
}

// check closes the connection if a write has failed, so that the reader
// notices.
func (w *sender) check(err error) {
	if err != nil {
		w.dead.Store(true)
		w.conn.Close()
	}
}

// exclusive waits until nobody writes and lets only the caller write, with
// writeNow, until it calls done.
func (w *sender) exclusive() {
	w.mu.Lock()
	for w.busy {
		w.idle.Wait()
	}
	w.busy = true
	w.mu.Unlock()
}

// writeNow writes p and says whether it could; the caller has called exclusive.
func (w *sender) writeNow(p []byte) bool {
	if w.dead.Load() {
		return false
	}
	err := w.put(p)
	w.check(err)
	return err == nil
}

// quiet says that there is nothing to write and nobody writes.
func (w *sender) quiet() bool {
	w.mu.Lock()
	defer w.mu.Unlock()
	return !w.busy
}

// lastWords gives the client d to take all the replies that are left.
func (w *sender) lastWords(d time.Duration) {
	w.last.Store(true)
	w.conn.SetWriteDeadline(time.Now().Add(d))
}

// done ends what exclusive began, and writes what others left meanwhile.
func (w *sender) done() {
	w.mu.Lock()
	w.drainLocked()
	w.mu.Unlock()
}
