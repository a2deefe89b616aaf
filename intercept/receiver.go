// Requests on their way from the socket.
//
// A client that sends its next request when it has the reply leaves us with
// nothing to do for 10 to 20 us. To sleep that long costs more than it saves: an
// idle processor, above all a virtual one, takes as long to wake as the request
// takes to serve. So for a client that is prompt we keep looking for a while.
// It counts as prompt if we had to wait for each of its last requests, until one
// is late. At a greater depth, where we seldom have to wait, nobody looks: to sleep
// lets requests come together, and their replies leave together.

package intercept

import (
	"io"
	"net"
	"runtime"
	"sync/atomic"
	"syscall"
	"time"
)

// promptAfter is how many requests in a row we have to wait for until a client
// counts as prompt.
const promptAfter = 16

// lookLimit is how long we keep looking. A prompt client that is later than
// this costs us the time in vain, and is not prompt any more. Longer in tests.
var lookLimit = 40 * time.Microsecond

// receiver owns the reading side of a connection. Its methods are the reader's.
type receiver struct {
	conn net.Conn
	raw  syscall.RawConn // nil where there is no socket at hand, as with TLS, or one processor

	// looking is the server's: one at a time looks, and others have the rest of
	// the processors.
	looking *atomic.Bool
	waits   int  // requests in a row that we had to wait for; 0 after one was late
	next    bool // the next request is read, not the rest of one

	// What tryRead is called with, and what came of it.
	try    func(fd uintptr) bool // tryRead; making it at each call would allocate
	p      []byte
	n      int
	err    error
	waited bool
}

func newReceiver(conn net.Conn, looking *atomic.Bool) *receiver {
	r := &receiver{conn: conn, looking: looking}
	if c, ok := conn.(syscall.Conn); ok && runtime.GOMAXPROCS(0) > 1 {
		r.raw, _ = c.SyscallConn()
	}
	r.try = r.tryRead
	return r
}

// Read is conn.Read for what small requests consist of.
func (r *receiver) Read(p []byte) (int, error) {
	if r.raw == nil {
		return r.conn.Read(p)
	}
	r.p, r.n, r.err, r.waited = p, 0, nil, false
	err := r.raw.Read(r.try)
	r.p = nil
	if err == nil {
		err = r.err
	}
	if err == nil && r.n == 0 {
		err = io.EOF
	}
	if r.next && !r.waited {
		r.waits = 0
	}
	return r.n, err
}

// tryRead reads what is there. It returns false if there is nothing: it is called
// again when there may be.
func (r *receiver) tryRead(fd uintptr) bool {
	if r.readNow(int(fd)) {
		return true
	}
	if r.waited {
		return false // woken for nothing
	}
	r.waited = true
	if r.next {
		r.waits++
	}
	if r.waits <= promptAfter || !r.looking.CompareAndSwap(false, true) {
		return false
	}
	defer r.looking.Store(false)
	for begun := time.Now(); time.Since(begun) < lookLimit; {
		if r.readNow(int(fd)) {
			return true
		}
	}
	r.waits = 0
	return false
}

// readNow reads what is there, and returns false if there is nothing.
func (r *receiver) readNow(fd int) bool {
	for {
		n, err := syscall.Read(fd, r.p)
		switch err {
		case syscall.EINTR:
			continue
		case syscall.EAGAIN:
			return false
		}
		r.n, r.err = max(n, 0), err
		return true
	}
}
