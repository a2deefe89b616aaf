// READ.

package intercept

const (
	// pieceSize is what one piece of a large request has at most, in bytes.
	pieceSize = 1 << 20

	// smallSize is the longest read that is served right into the batch.
	smallSize = 64 << 10
)

// read serves a read of 1 to maxPayload bytes that has entered the lease.
func (s *session) read(q *request) {
	n := int64(q.n)
	if s.try != nil && n <= smallSize && s.readSmall(q) {
		return
	}
	if n > floorSize && (s.style == simple || q.flags&NBD_CMD_FLAG_DF != 0) {
		s.readUnsplit(q)
		return
	}
	got := s.account.take(min(n, pieceSize))
	if got >= n {
		s.startRead(newJob(s, q), got)
		return
	}
	w := &whole{off: -1}
	w.left.Store(1)
	for off, end := int64(q.off), int64(q.off)+n; off < end; {
		if got == 0 {
			got = s.account.take(min(end-off, pieceSize))
		}
		j := newJob(s, q)
		j.off, j.n, j.whole = off, min(end-off, got), w
		w.left.Add(1)
		off += j.n
		s.startRead(j, got)
		got = 0
	}
	s.endPiece(q, w, reader)
}

// readSmall reads into the batch what can be read at once; it returns false,
// and nothing has happened, if it cannot.
func (s *session) readSmall(q *request) bool {
	head, n, off := s.style.headSize(), int64(q.n), int64(q.off)
	s.room(max(head+n, maxAnswer))
	start := int64(len(s.pending)) + head
	err := s.try.TryRead(s.pending[start:start+n:start+n], off)
	if isWouldBlock(err) {
		return false
	}
	s.lease.leave()
	if err != nil {
		s.answer(q, err, off)
		return true
	}
	s.pending = appendDataHead(s.pending, s.style, q, NBD_REPLY_FLAG_DONE, off, n)
	s.pending = s.pending[:start+n]
	if s.trace {
		s.logRequest(q, nil)
	}
	return true
}

// readUnsplit serves a read whose reply must be in one: a simple reply says
// before the data whether all of it could be read, and DF asks for one chunk.
func (s *session) readUnsplit(q *request) {
	n := int64(q.n)
	if s.account.takeWhole(n) {
		_, n = sizeClass(n)
		s.startRead(newJob(s, q), n)
		return
	}
	if s.style != simple {
		// "A server MAY reject a client's request with the error
		// NBD_EOVERFLOW if the length is too large to send without
		// fragmentation."
		s.lease.leave()
		s.answer(q, errReadTooLong, -1)
		return
	}
	s.startRead(newJob(s, q), s.account.take(floorSize))
}

// startRead begins a read with a buffer of size bytes, which have been taken.
func (s *session) startRead(j *job, size int64) {
	j.buf = newBuffer(s.account, size)
	if s.try != nil && j.n <= pieceSize && j.n <= size {
		if err := s.try.TryRead(j.buf.data(j.n), j.off); !isWouldBlock(err) {
			j.end(err, reader)
			return
		}
	}
	s.dispatch(j)
}

// stream answers a read that is longer than its buffer, with a simple reply.
// Its header says that all went well before all was read. If that turns out to
// be wrong "the server MUST immediately initiate a hard disconnect", section
// "NBD_CMD_READ". This is for a server that has no more memory to give.
func (j *job) stream() {
	s, size := j.s, j.buf.size
	err := s.dev.Read(j.buf.data(size), j.off)
	if err != nil {
		j.end(err, worker)
		return
	}
	s.sender.exclusive()
	head := headroom - s.style.headSize()
	appendDataHead(j.buf.mem[head:head], s.style, &j.q, 0, j.off, j.n)
	err = s.sender.writeNow(j.buf.mem[head:])
	for done := size; done < j.n && err == nil; done += size {
		p := j.buf.data(min(size, j.n-done))
		if err = s.dev.Read(p, j.off+done); err == nil {
			err = s.sender.writeNow(p)
		}
	}
	if err != nil {
		s.log.Warn("disconnect: read failed after the reply began", "off", j.off, "n", j.n, "err", err)
		s.conn.Close()
	}
	s.lease.leave()
	j.buf.free()
	s.sender.done()
}
