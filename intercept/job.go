// What a worker does: one request, or one piece of a large one.

package intercept

import "sync"

// job is a request, or a piece of it, on its way through the Device.
type job struct {
	s      *session
	q      request
	off, n int64   // bytes: this piece's
	buf    *buffer // payload, or room for the data; may be nil
	whole  *whole  // the request that it is a piece of; nil: all of it

	rest func() error // of a write that was taken from the reader; nil: it has not begun
}

var jobs = sync.Pool{New: func() any { return new(job) }}

// newJob returns a job for all of q.
func newJob(s *session, q *request) *job {
	j := jobs.Get().(*job)
	*j = job{s: s, q: *q, off: int64(q.off), n: int64(q.n)}
	return j
}

// run serves j. It is called by workers.
func (j *job) run() {
	if j.q.typ == NBD_CMD_READ && j.n > j.buf.size {
		j.stream()
		return
	}
	j.end(j.serve(), worker)
}

// serve calls the Device and waits for it.
func (j *job) serve() error {
	dev := j.s.dev
	switch j.q.typ {
	case NBD_CMD_READ:
		return dev.Read(j.buf.data(j.n), j.off)
	case NBD_CMD_WRITE:
		if j.rest != nil {
			return j.rest()
		}
		return dev.Write(j.buf.data(j.n), j.off, j.q.flags&NBD_CMD_FLAG_FUA != 0)
	case NBD_CMD_FLUSH:
		return dev.Flush()
	case NBD_CMD_TRIM:
		return j.steps(dev.Trim)
	case NBD_CMD_CACHE:
		return dev.Cache(j.off, min(j.n, maxCache))
	case NBD_CMD_BLOCK_STATUS:
		return j.status()
	}
	return j.steps(func(off, n int64, fua bool) error {
		return dev.WriteZeroes(off, n, ZeroFlags{
			FUA:    fua,
			NoHole: j.q.flags&NBD_CMD_FLAG_NO_HOLE != 0,
			Fast:   j.q.flags&NBD_CMD_FLAG_FAST_ZERO != 0,
		})
	})
}

const (
	// maxStep is how much of a request without payload goes to the Device at a
	// time, in bytes: such a request can be of a whole disk, and take hours that
	// nobody waits for any more.
	maxStep = 1 << 30

	// maxCache is how much is read ahead for one request, which is only a hint.
	maxCache = maxPayload
)

// steps calls do for the parts of the request, in order, until one fails or nobody
// waits for the rest.
func (j *job) steps(do func(off, n int64, fua bool) error) error {
	fua := j.q.flags&NBD_CMD_FLAG_FUA != 0
	if j.n <= maxStep {
		return do(j.off, j.n, fua)
	}
	for off, end := j.off, j.off+j.n; off < end; off += maxStep {
		if j.s.gone.Load() || j.s.lease.isClosed() {
			return errGone
		}
		if err := do(off, min(end-off, maxStep), false); err != nil {
			return err
		}
	}
	if fua {
		return j.s.dev.Flush()
	}
	return nil
}

// caller says whose goroutine it is: the reader's answers go into its batch, so
// that a client which reads none cannot make it collect more than that.
type caller bool

const (
	reader caller = true
	worker caller = false
)

// end replies to a request that came back from the Device with err; j must not
// be used any more.
func (j *job) end(err error, who caller) {
	s, buf, done := j.s, j.buf, NBD_REPLY_FLAG_DONE
	if j.whole != nil {
		done = 0
		if err != nil {
			j.whole.fail(err, j.off)
		}
	} else {
		s.lease.leave()
	}
	sent := false
	if buf != nil {
		if sent = err == nil && j.fillReply(done); sent {
			s.sender.send(buf)
		} else {
			buf.free()
		}
	}
	switch {
	case j.whole != nil:
		s.endPiece(&j.q, j.whole, who)
	case !sent:
		s.reply(&j.q, err, j.off, who)
	case s.trace:
		s.logRequest(&j.q, nil)
	}
	*j = job{}
	jobs.Put(j)
}

// fillReply makes the data in the buffer a reply, and returns false where the
// request has no data to reply with.
func (j *job) fillReply(done uint16) bool {
	switch j.q.typ {
	case NBD_CMD_READ:
		j.fillData(done)
	case NBD_CMD_BLOCK_STATUS:
	default:
		return false
	}
	return true
}

// reply sends the answer to q.
func (s *session) reply(q *request, err error, off int64, who caller) {
	if who == reader {
		s.answer(q, err, off)
		return
	}
	var room [maxAnswer]byte
	s.sender.sendSmall(appendAnswer(room[:0], s.style, q, err, off))
	if s.trace {
		s.logRequest(q, err)
	}
}
