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

// sender owns the writing side of a connection. Its methods may be called from
// any goroutine.
type sender struct {
	conn    net.Conn
	apart   bool          // large data is written alone
	timeout time.Duration // for one write; 0: none
	dead    atomic.Bool   // a write has failed: nobody gets replies any more

	// mu protects the fields below. Never held across I/O.
	mu    sync.Mutex
	idle  sync.Cond // busy became false
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
	w.idle.L = &w.mu
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
	w.limit()

	var err error
	for rest := parts; len(rest) > 0 && err == nil; {
		n := w.together(rest)
		if n == 1 {
			_, err = w.conn.Write(rest[0])
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
	w.limit()
	_, err := w.conn.Write(p)
	w.check(err)
	return err == nil
}

// quiet says that there is nothing to write and nobody writes.
func (w *sender) quiet() bool {
	w.mu.Lock()
	defer w.mu.Unlock()
	return !w.busy
}

// limit sets the time that the next write may take.
func (w *sender) limit() {
	if w.timeout > 0 {
		w.conn.SetWriteDeadline(time.Now().Add(w.timeout))
	}
}

// done ends what exclusive began, and writes what others left meanwhile.
func (w *sender) done() {
	w.mu.Lock()
	w.drainLocked()
	w.mu.Unlock()
}
