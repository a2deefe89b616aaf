// The transmission phase of a connection: the reader's loop.

package intercept

import (
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"os"
	"time"
)

const (
	inputSize = 64 << 10  // bytes of requests read at once
	batchSize = 128 << 10 // bytes of replies written at once

	// maxDiscard is how long a payload may be that is too long and still
	// skipped; a longer one ends the connection.
	maxDiscard = 2 * maxPayload

	// lastLook is how long a stopping server waits for requests that are
	// already on their way.
	lastLook = 20 * time.Millisecond

	// lastWords is how long a client that has ended its requests may take to
	// read the replies.
	lastWords = 30 * time.Second
)

// session is a connection in the transmission phase. Its methods are the
// reader's, unless they say that workers call them too.
type session struct {
	server   *Server
	conn     net.Conn
	log      *slog.Logger
	dev      Device
	mapper   Mapper    // nil if dev has none; contexts is then empty
	try      TryReader // nil if dev has none
	tryWrite TryWriter // nil if dev has none
	size     uint64    // of dev, in bytes
	readOnly bool
	style    style
	flags    uint16 // command flags that were negotiated
	contexts []metaContext

	lease   *lease
	account *account
	pool    *pool
	sender  *sender

	// input is what the socket gave: input[r:w] was not looked at yet.
	input []byte
	r, w  int

	// batch collects replies until the input has no whole next header. There
	// are two of them, so that one can be filled while the other is sent.
	batch   *buffer
	pending []byte // of batch, to be sent
	batches chan *buffer

	trace bool // log each request, as was asked for when the session began
}

// newSession returns the session of what h has negotiated.
func newSession(s *Server, h *handshake, l *lease, log *slog.Logger) *session {
	dev := h.export.Device
	n := &session{
		server: s, conn: h.conn, log: log, lease: l,
		dev: dev, size: uint64(dev.Size()), readOnly: dev.ReadOnly(),
		style: h.style, flags: h.commandFlags(), contexts: h.contexts,
		pool: newPool(), sender: newSender(h.conn, s.opts.IdleTimeout),
		trace:   log.Enabled(s.ctx, slog.LevelDebug),
		input:   make([]byte, inputSize),
		batches: make(chan *buffer, 2),
	}
	n.account = s.budget.open(n.flush) // the replies so far must not wait with us
	n.try, _ = dev.(TryReader)
	n.tryWrite, _ = dev.(TryWriter)
	n.mapper, _ = dev.(Mapper)
	for range cap(n.batches) {
		n.batches <- &buffer{home: n.batches}
	}
	return n
}

// run serves requests until the client disconnects or breaks the protocol, the
// connection fails, or the server stops. All requests have ended and all
// replies are written, or cannot be, when it returns.
func (s *session) run() error {
	err := s.loop()
	s.conn.SetWriteDeadline(time.Now().Add(lastWords))
	s.flush()
	s.pool.close()
	s.lease.close()
	return err
}

// errIdle ends a connection that sent nothing for Options.IdleTimeout.
var errIdle = errors.New("idle for too long")

// errStopped ends a connection when the server stops.
var errStopped = errors.New("server stopped")

func (s *session) loop() error {
	for {
		size := s.style.requestSize()
		if s.w-s.r < size {
			if err := s.fill(size); err != nil {
				return err
			}
		}
		q, ok := parseRequest(s.input[s.r:s.w], s.style)
		if !ok {
			return fmt.Errorf("bad magic in request %x", s.input[s.r:s.r+size])
		}
		s.r += size
		if q.typ == NBD_CMD_DISC {
			return nil
		}
		if err := s.handle(&q); err != nil {
			return err
		}
	}
}

// handle serves one request, or hands it to a worker. It returns an error only
// if the connection cannot go on.
func (s *session) handle(q *request) error {
	var err error
	if q.typ == NBD_CMD_BLOCK_STATUS && q.payload(s.style) > 0 {
		var broken error
		if err, broken = s.statusPayload(q); broken != nil {
			return broken
		}
	}
	if err == nil {
		err = s.check(q)
	}
	if err == nil && !s.lease.enter() {
		err = errGone
	}
	if err != nil {
		if err := s.discard(q.payload(s.style)); err != nil {
			return err
		}
		s.answer(q, err, -1)
		return nil
	}
	switch {
	case q.typ == NBD_CMD_BLOCK_STATUS:
		j := newJob(s, q)
		j.buf = newBuffer(s.account, s.account.take(statusSize))
		s.dispatch(j)
	case q.typ == NBD_CMD_FLUSH:
		s.dispatch(newJob(s, q))
	case q.n == 0:
		s.lease.leave()
		s.answer(q, nil, -1)
	case q.typ == NBD_CMD_READ:
		s.read(q)
	case q.typ == NBD_CMD_WRITE:
		return s.write(q)
	default:
		s.dispatch(newJob(s, q))
	}
	return nil
}

// dispatch hands j to a worker.
func (s *session) dispatch(j *job) {
	if !s.pool.do(j) {
		s.flush() // the replies so far must not wait with us
		s.pool.doWait(j)
	}
}

// answer puts the answer to q into the batch.
func (s *session) answer(q *request, err error, off int64) {
	s.room(maxAnswer)
	s.pending = appendAnswer(s.pending, s.style, q, err, off)
	if s.trace {
		s.logRequest(q, err)
	}
}

// logRequest may be called by workers.
func (s *session) logRequest(q *request, err error) {
	s.log.Debug("request", "type", q.typ, "flags", q.flags, "off", q.off, "n", q.n, "err", err)
}

// room makes sure that n bytes can be added to the batch.
func (s *session) room(n int64) {
	if int64(cap(s.pending)-len(s.pending)) >= n {
		return
	}
	s.flush()
	if s.batch == nil {
		s.batch = <-s.batches
		if s.batch.mem == nil {
			s.batch.mem = make([]byte, batchSize)
		}
		s.pending = s.batch.mem[:0]
	}
}

// flush sends the batch, if there is anything in it.
func (s *session) flush() {
	if len(s.pending) == 0 {
		return
	}
	s.batch.parts = append(s.batch.parts, s.pending)
	b := s.batch
	s.batch, s.pending = nil, nil
	s.sender.send(b)
}

// fill reads until input holds n bytes, at most inputSize.
func (s *session) fill(n int) error {
	s.w = copy(s.input, s.input[s.r:s.w])
	s.r = 0
	for s.w-s.r < n {
		m, err := s.receive(s.input[s.w:])
		s.w += m
		if err != nil {
			if err == io.EOF && s.w > s.r {
				err = io.ErrUnexpectedEOF
			}
			return err
		}
	}
	return nil
}

// readFull fills p with what comes next.
func (s *session) readFull(p []byte) error {
	n := copy(p, s.input[s.r:s.w])
	s.r += n
	for n < len(p) {
		m, err := s.receive(p[n:])
		n += m
		if err == io.EOF {
			return io.ErrUnexpectedEOF
		}
		if err != nil {
			return err
		}
	}
	return nil
}

// discard skips n bytes of payload.
func (s *session) discard(n uint64) error {
	if n > maxDiscard || s.style == extended && n > maxPayload {
		return fmt.Errorf("payload of %d bytes", n)
	}
	for n > 0 {
		if s.r == s.w {
			if err := s.fill(1); err != nil {
				return err
			}
		}
		m := min(n, uint64(s.w-s.r))
		s.r += int(m)
		n -= m
	}
	return nil
}

// receive reads some bytes from the socket, at least one if it returns nil.
func (s *session) receive(p []byte) (int, error) {
	s.flush()
	for {
		if idle := s.server.opts.IdleTimeout; idle > 0 {
			s.conn.SetReadDeadline(time.Now().Add(idle))
		}
		// Look after setting the deadline: Shutdown sets one after it has set
		// stopping, so one of us ends this read.
		stopping := s.server.stopping.Load()
		if stopping {
			s.conn.SetReadDeadline(time.Now().Add(lastLook))
		}
		n, err := s.conn.Read(p)
		switch {
		case n > 0:
			return n, nil
		case !errors.Is(err, os.ErrDeadlineExceeded):
			return 0, err
		case stopping && s.lease.idle():
			return 0, errStopped
		case !stopping && !s.server.stopping.Load() && s.lease.idle():
			return 0, errIdle
		}
	}
}
