// The reader's replies, collected so that one system call writes many.

package intercept

// batchSize is how many bytes of replies are written at once.
const batchSize = 128 << 10

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
