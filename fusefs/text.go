// Long texts in memory.

package fusefs

import "bytes"

// textChunk is the unit in which texts are held, in bytes.
const textChunk = 64 << 10

// text is a text that is written once and then read. It grows without being
// copied, and ends no longer than it must be.
type text struct {
	budget *budget
	chunks [][]byte // all but the last hold textChunk bytes
	size   int64
	held   int64 // taken from the budget
}

// write adds p. After an error the text is to be freed.
func (t *text) write(p []byte) error {
	for len(p) > 0 {
		if t.size%textChunk == 0 {
			if err := t.budget.take(textChunk); err != nil {
				return err
			}
			t.held += textChunk
			t.chunks = append(t.chunks, make([]byte, 0, textChunk))
		}
		last := &t.chunks[len(t.chunks)-1]
		n := min(len(p), textChunk-len(*last))
		*last = append(*last, p[:n]...)
		t.size += int64(n)
		p = p[n:]
	}
	return nil
}

// trim gives back what the last chunk does not need; nothing is written then.
func (t *text) trim() {
	if len(t.chunks) > 0 {
		last := &t.chunks[len(t.chunks)-1]
		*last = bytes.Clone(*last)
	}
	t.budget.used.Add(t.size - t.held)
	t.held = t.size
}

// free takes the text out of the budget. Nobody reads it any more.
func (t *text) free() { t.budget.used.Add(-t.held) }

// readAt fills p from off on and returns how many bytes there were. It does not
// fail.
func (t *text) readAt(p []byte, off int64) (int, error) {
	n := 0
	for n < len(p) && off < t.size {
		m := copy(p[n:], t.chunks[off/textChunk][off%textChunk:])
		n, off = n+m, off+int64(m)
	}
	return n, nil
}
