// Replies: their headers in the three styles.

package intercept

import "encoding/binary"

// style is how the replies of a connection look.
type style int

const (
	simple     style = iota // all that a client knows which did not ask
	structured              // NBD_OPT_STRUCTURED_REPLY
	extended                // NBD_OPT_EXTENDED_HEADERS, for requests as well
)

func (st style) String() string {
	return [...]string{simple: "simple", structured: "structured", extended: "extended"}[st]
}

// headSize is the length in bytes of what stands in front of the data of a
// read: a reply's header, in chunks followed by the data's offset.
func (st style) headSize() int64 {
	switch st {
	case simple:
		return simpleReplySize
	case structured:
		return structuredReplySize + 8
	}
	return extendedReplySize + 8
}

// requestSize is the length in bytes of a request's header.
func (st style) requestSize() int {
	if st == extended {
		return extendedRequestSize
	}
	return requestSize
}

// appendSimple appends a simple reply, section "Simple reply message".
func appendSimple(p []byte, q *request, errno uint32) []byte {
	p = binary.BigEndian.AppendUint32(p, NBD_SIMPLE_REPLY_MAGIC)
	p = binary.BigEndian.AppendUint32(p, errno)
	return binary.BigEndian.AppendUint64(p, q.cookie)
}

// appendChunk appends the header of a chunk with n bytes of payload, section
// "Structured reply chunk message" or "Extended reply chunk message".
func appendChunk(p []byte, st style, q *request, flags, typ uint16, n int64) []byte {
	if st == extended {
		p = binary.BigEndian.AppendUint32(p, NBD_EXTENDED_REPLY_MAGIC)
		p = binary.BigEndian.AppendUint16(p, flags)
		p = binary.BigEndian.AppendUint16(p, typ)
		p = binary.BigEndian.AppendUint64(p, q.cookie)
		p = binary.BigEndian.AppendUint64(p, q.off)
		return binary.BigEndian.AppendUint64(p, uint64(n))
	}
	p = binary.BigEndian.AppendUint32(p, NBD_STRUCTURED_REPLY_MAGIC)
	p = binary.BigEndian.AppendUint16(p, flags)
	p = binary.BigEndian.AppendUint16(p, typ)
	p = binary.BigEndian.AppendUint64(p, q.cookie)
	return binary.BigEndian.AppendUint32(p, uint32(n))
}

// appendDataHead appends what stands in front of n bytes from off, headSize
// bytes.
func appendDataHead(p []byte, st style, q *request, flags uint16, off, n int64) []byte {
	if st == simple {
		return appendSimple(p, q, 0)
	}
	p = appendChunk(p, st, q, flags, NBD_REPLY_TYPE_OFFSET_DATA, 8+n)
	return binary.BigEndian.AppendUint64(p, uint64(off))
}

// appendHole appends a chunk that says that n bytes from off are zeroes.
func appendHole(p []byte, st style, q *request, flags uint16, off, n int64) []byte {
	p = appendChunk(p, st, q, flags, NBD_REPLY_TYPE_OFFSET_HOLE, 12)
	p = binary.BigEndian.AppendUint64(p, uint64(off))
	return binary.BigEndian.AppendUint32(p, uint32(n))
}

// maxMessage is how much of an error's text is sent, in bytes.
const maxMessage = 200

// maxAnswer is the longest that appendAnswer appends, in bytes.
const maxAnswer = extendedReplySize + 4 + 2 + maxMessage + 8

// appendAnswer appends the last message about q, without data: done if err is
// nil, else the error with its text and, for a read, the offset where it was
// met.
func appendAnswer(p []byte, st style, q *request, err error, off int64) []byte {
	errno := wireErrno(q, err)
	if st == simple || st == structured && errno == 0 && q.typ != NBD_CMD_READ {
		return appendSimple(p, q, errno)
	}
	if errno == 0 {
		return appendChunk(p, st, q, NBD_REPLY_FLAG_DONE, NBD_REPLY_TYPE_NONE, 0)
	}
	text := wireText(err.Error())
	typ, n := NBD_REPLY_TYPE_ERROR, int64(4+2+len(text))
	if q.typ == NBD_CMD_READ && off >= 0 {
		typ, n = NBD_REPLY_TYPE_ERROR_OFFSET, n+8
	}
	p = appendChunk(p, st, q, NBD_REPLY_FLAG_DONE, typ, n)
	p = binary.BigEndian.AppendUint32(p, errno)
	p = binary.BigEndian.AppendUint16(p, uint16(len(text)))
	p = append(p, text...)
	if typ == NBD_REPLY_TYPE_ERROR_OFFSET {
		p = binary.BigEndian.AppendUint64(p, uint64(off))
	}
	return p
}
