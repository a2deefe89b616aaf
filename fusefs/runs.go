// Changed runs as lines of text.

package fusefs

import (
	"errors"
	"iter"
	"strconv"
)

// batch is how many bytes of lines are formatted before they are handed on.
const batch = 32 << 10

// render hands the lines of runs to emit, some at a time, and stops at the
// first error of either. emit does not keep what it gets.
func render(runs iter.Seq2[Run, error], emit func([]byte) error) error {
	buf := make([]byte, 0, batch+64)
	for r, err := range runs {
		if err != nil {
			return err
		}
		buf = appendRun(buf, r)
		if len(buf) >= batch {
			if err := emit(buf); err != nil {
				return err
			}
			buf = buf[:0]
		}
	}
	return emit(buf)
}

// appendRun appends "OFFSET LENGTH KIND\n".
func appendRun(b []byte, r Run) []byte {
	b = strconv.AppendInt(b, r.Off, 10)
	b = append(b, ' ')
	b = strconv.AppendInt(b, r.N, 10)
	if r.Zero {
		return append(b, " zero\n"...)
	}
	return append(b, " data\n"...)
}

// measure returns how many bytes the lines of runs have.
func measure(runs iter.Seq2[Run, error]) (int64, error) {
	var n int64
	err := render(runs, func(p []byte) error {
		n += int64(len(p))
		return nil
	})
	return n, err
}

// fill returns the lines of runs. The caller frees them.
func (b *budget) fill(runs iter.Seq2[Run, error]) (*text, error) {
	t := &text{budget: b}
	if err := render(runs, t.write); err != nil {
		t.free()
		return nil, err
	}
	t.trim()
	return t, nil
}

// errDiffers ends a comparison.
var errDiffers = errors.New("differs")

// equals says whether the lines of runs are t. It reads no more runs than it
// must to know.
func (t *text) equals(runs iter.Seq2[Run, error]) bool {
	var off int64
	err := render(runs, func(p []byte) error {
		if !t.hasAt(p, off) {
			return errDiffers
		}
		off += int64(len(p))
		return nil
	})
	return err == nil && off == t.size
}
