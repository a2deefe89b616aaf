// READ.

package intercept

// smallSize is the longest read that is served right into the batch, in bytes.
const smallSize = 64 << 10

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
	s.split(q, (*session).startRead) // fails never
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
// It returns nil; start functions may fail.
func (s *session) startRead(j *job, size int64) error {
	j.buf = newBuffer(s.account, size)
	if s.try != nil && j.n <= pieceSize && j.n <= size {
		if err := s.try.TryRead(j.buf.data(j.n), j.off); !isWouldBlock(err) {
			j.end(err, reader)
			return nil
		}
	}
	s.dispatch(j)
	return nil
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
	head := j.buf.head - s.style.headSize()
	appendDataHead(j.buf.mem[head:head], s.style, &j.q, 0, j.off, j.n)
	ok := s.sender.writeNow(j.buf.mem[head:])
	for done := size; done < j.n && ok; done += size {
		p := j.buf.data(min(size, j.n-done))
		if err := s.dev.Read(p, j.off+done); err != nil {
			s.log.Warn("disconnect: read failed after the reply began", "off", j.off+done, "n", len(p), "err", err)
			s.conn.Close()
			break
		}
		ok = s.sender.writeNow(p)
	}
	s.lease.leave()
	j.buf.free()
	s.sender.done()
}
