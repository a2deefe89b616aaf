// The transmission phase of a connection: the reader's loop.

package intercept

import (
	"fmt"
	"log/slog"
	"net"
	"sync/atomic"
	"time"
)

// lastWords is how long a client that has ended its requests may take to read
// the replies.
const lastWords = 30 * time.Second

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

	lease    *lease
	account  *account
	pool     *pool
	sender   *sender
	receiver *receiver

	// input is what the socket gave: input[r:w] was not looked at yet.
	input []byte
	r, w  int

	// batch collects replies until the input has no whole next header. There
	// are two of them, so that one can be filled while the other is sent.
	batch   *buffer
	pending []byte // of batch, to be sent
	batches chan *buffer

	// What is being written at once, for goOn: started, or small from the input if it
	// is nil. taken is goOn; making it at each write would allocate.
	started *job
	small   request
	taken   func(rest func() error)

	ended chan error  // why the last reader has ended
	gone  atomic.Bool // the client is, or the server stops: nobody wants the rest of long requests
	trace bool        // log each request, as was asked for when the session began
}

// newSession returns the session of what h has negotiated.
func newSession(s *Server, h *handshake, l *lease, log *slog.Logger) *session {
	dev := h.export.Device
	n := &session{
		server: s, conn: h.conn, log: log, lease: l,
		dev: dev, size: uint64(dev.Size()), readOnly: dev.ReadOnly(),
		style: h.style, flags: h.commandFlags(), contexts: h.contexts,
		pool: newPool(&s.spares), sender: newSender(h.conn, s.opts.IdleTimeout), receiver: newReceiver(h.conn, &s.looking),
		trace:   log.Enabled(s.ctx, slog.LevelDebug),
		input:   make([]byte, inputSize),
		batches: make(chan *buffer, 2),
		ended:   make(chan error, 1),
	}
	n.taken = n.goOn
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
	go s.runReader()
	err := <-s.ended
	if err != nil {
		s.gone.Store(true)
	}
	s.sender.lastWords(lastWords)
	s.flush()
	s.pool.close()
	s.lease.close()
	return err
}

// runReader is the reader, until the session ends or another takes its place.
func (s *session) runReader() {
	if err := s.loop(); err != ErrTaken {
		s.ended <- err
	}
}

func (s *session) loop() error {
	for {
		if s.sender.dead.Load() {
			// What is left in the input could be thousands of large reads.
			return errNoReplies
		}
		size := s.style.requestSize()
		if s.w-s.r < size {
			s.receiver.next = true
			err := s.fill(size)
			s.receiver.next = false
			if err != nil {
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
// if the connection cannot go on: ErrTaken, if it cannot with this reader.
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

// dispatch hands j to a worker, when the client has taken enough of the replies that
// it is owed.
func (s *session) dispatch(j *job) {
	if s.sender.flooded() {
		s.flush() // the replies so far must not wait with us
		s.sender.waitForEbb()
	}
	if !s.pool.do(j) {
		s.flush() // the replies so far must not wait with us
		s.pool.doWait(j)
	}
}
