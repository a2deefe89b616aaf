// Reading a file.

package qcow2

import (
	"encoding/binary"
	"fmt"
	"io"
)

// part is the bytes [start, end) of the file. The parts follow each other.
type part struct {
	start, end int64
	read       func(p []byte, off int64) error // fills p from off bytes after start
}

// split returns the parts of the file, in order.
func (f *File) split() []part {
	return []part{
		{0, f.at.l1, f.readHeader},
		{f.at.l1, f.at.refTable, f.readL1},
		{f.at.refTable, f.at.refBlocks, f.readRefTable},
		{f.at.refBlocks, f.at.tables, f.readRefBlocks},
		{f.at.tables, f.at.data, f.readTables},
		{f.at.data, f.at.end, f.readData},
	}
}

// ReadAt fills p from off on, which is not negative, by the rules of io.ReaderAt.
// It fails with an error of the image where that is read; for all but data it is
// not.
func (f *File) ReadAt(p []byte, off int64) (int, error) {
	n := 0
	for _, part := range f.parts {
		at := off + int64(n)
		if n == len(p) || at >= part.end {
			continue
		}
		m := int(min(int64(len(p)-n), part.end-at))
		if err := part.read(p[n:n+m], at-part.start); err != nil {
			return n, err
		}
		n += m
	}
	if n < len(p) {
		return n, io.EOF
	}
	return n, nil
}

func (f *File) readHeader(p []byte, off int64) error {
	clear(p)
	copy(p, f.head[min(off, int64(len(f.head))):])
	return nil
}

func (f *File) readL1(p []byte, off int64) error {
	words(p, off, func(i int64) uint64 {
		n, ok := f.kinds.table(i)
		if !ok {
			return 0
		}
		return owned | uint64(f.at.tables+n<<f.at.shift)
	})
	return nil
}

func (f *File) readRefTable(p []byte, off int64) error {
	words(p, off, func(i int64) uint64 {
		block := f.at.refBlocks + i<<f.at.shift
		if block >= f.at.tables {
			return 0
		}
		return uint64(block)
	})
	return nil
}

func (f *File) readRefBlocks(p []byte, off int64) error {
	end := f.at.end >> f.at.shift * refcountSize
	for i := range p {
		p[i] = 0
		if at := off + int64(i); at < end {
			p[i] = byte(at % refcountSize) // the number 1, big-endian
		}
	}
	return nil
}

func (f *File) readTables(p []byte, off int64) error {
	for len(p) > 0 {
		n, skip := off>>f.at.shift, off&(1<<f.at.shift-1)
		m := min(int64(len(p)), 1<<f.at.shift-skip)
		f.readTable(p[:m], n, skip)
		p, off = p[m:], off+m
	}
	return nil
}

// readTable fills p from skip bytes on in the n-th table.
func (f *File) readTable(p []byte, n, skip int64) {
	s, _ := f.kinds.find(func(s *stretch) bool { return s.tables <= n })
	next := s.before(n, skip/wordSize, f.kinds.entries)
	words(p, skip, func(entry int64) uint64 {
		switch s.kindOf(entry) {
		case data:
			next++
			return owned | uint64(f.at.data+(next-1)<<f.at.shift)
		case zero:
			return zeroEntry
		}
		return 0
	})
}

// words fills p with what is at off in a table of 64-bit words. It asks for each
// word once, in ascending order.
func words(p []byte, off int64, word func(i int64) uint64) {
	var b [wordSize]byte
	for len(p) > 0 {
		binary.BigEndian.PutUint64(b[:], word(off/wordSize))
		n := copy(p, b[off%wordSize:])
		p, off = p[n:], off+int64(n)
	}
}

func (f *File) readData(p []byte, off int64) error {
	for len(p) > 0 {
		cluster, count := f.kinds.cluster(off >> f.at.shift)
		skip := off & (1<<f.at.shift - 1)
		m := min(int64(len(p)), count<<f.at.shift-skip)
		if err := f.readImage(p[:m], cluster<<f.at.shift+skip); err != nil {
			return err
		}
		p, off = p[m:], off+m
	}
	return nil
}

// readImage fills p from the image. A cluster can end behind the image; there it
// is zero.
func (f *File) readImage(p []byte, off int64) error {
	in := max(0, min(int64(len(p)), f.disk.Size-off))
	clear(p[in:])
	n, err := f.image.ReadAt(p[:in], off)
	switch {
	case err != nil && err != io.EOF:
	case int64(n) < in:
		err = io.ErrUnexpectedEOF
	default:
		return nil
	}
	return fmt.Errorf("read %d bytes of the image at %d: %w", in, off, err)
}
