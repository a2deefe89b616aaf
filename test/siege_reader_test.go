// Who uses the images of a daemon that will be killed.

package test

import (
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"syscall"
)

// readImage does something with an image: it reads all of a snapshot that nobody
// has read before, or a part of an image, or it writes to it.
func (l *life) readImage(rng *rand.Rand) error {
	sn := l.choose(rng, func(sn *taken) bool { return !sn.lost })
	if sn == nil {
		return nil
	}
	err := l.noteFirst(sn)
	if err == nil {
		err = l.useImage(rng, sn)
	}
	if err == nil || l.killed.Load() {
		return nil
	}
	return l.excuse(sn, err)
}

// noteFirst sees to it that it is known what the images hold.
func (l *life) noteFirst(sn *taken) error {
	l.noting.Lock()
	defer l.noting.Unlock()
	if l.isNoted(sn) {
		return nil
	}
	return l.note(sn, func(name string) ([]byte, error) { return os.ReadFile(l.d.snapshot(sn.name, name+".img")) })
}

func (s *siege) isNoted(sn *taken) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, i := range sn.images {
		return i.noted != nil
	}
	return true
}

// useImage reads or changes a part of an image.
func (l *life) useImage(rng *rand.Rand, sn *taken) error {
	for _, i := range sn.images { // any one
		off, n, ok := i.claim(rng, randomLength(rng))
		if !ok {
			return nil
		}
		defer i.release(off)
		use := l.useFile
		if rng.IntN(2) == 0 {
			use = l.useExport
		}
		return use(rng, sn, i, off, n)
	}
	return nil
}

// note reads all images of a snapshot for the first time, with read.
func (s *siege) note(sn *taken, read func(device string) ([]byte, error)) error {
	var all view
	got := make(map[string][]byte)
	for name, i := range sn.images {
		content, err := read(name)
		if err != nil {
			return err
		}
		v, err := i.instant.check(name, content)
		if err != nil {
			return &wrong{fmt.Errorf("%s: %w", sn.name, err)}
		}
		all = all.join(v)
		got[name] = content
	}
	if err := all.err(); err != nil {
		return &wrong{fmt.Errorf("%s: %w", sn.name, err)}
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	for name, i := range sn.images {
		i.noted, i.now, i.instant = append([]byte(nil), got[name]...), got[name], nil
	}
	s.told["noted"]++
	return nil
}

// useExport uses an image over NBD.
func (l *life) useExport(rng *rand.Rand, sn *taken, i *shot, off, n int64) error {
	conn, err := l.connect(i.name + "@" + sn.name)
	if err != nil {
		return err
	}
	defer conn.Close()
	if sn.writable && rng.IntN(2) == 0 {
		err = changeDisk(i.disk, conn, rng, off, n, l.pass())
	}
	return l.after(sn, i, err, off, n, conn.readAt)
}

// useFile uses it through the tree.
func (l *life) useFile(rng *rand.Rand, sn *taken, i *shot, off, n int64) error {
	flags := os.O_RDONLY
	if sn.writable {
		flags = os.O_RDWR
	}
	f, err := os.OpenFile(l.d.snapshot(sn.name, i.name+".img"), flags, 0)
	if err != nil {
		return err
	}
	defer f.Close()
	if sn.writable && rng.IntN(2) == 0 {
		p := make([]byte, n)
		Stamp(p, i.name, off, l.pass())
		c := i.send(off, p)
		if _, err = f.WriteAt(p, off); err == nil {
			i.ack(c)
		}
	}
	return l.after(sn, i, err, off, n, func(p []byte, off int64) error {
		_, err := f.ReadAt(p, off)
		return err
	})
}

// after reads the range of an image that may have been written to, with the error
// err. A write that found no space may have been done in part.
func (l *life) after(sn *taken, i *shot, err error, off, n int64, readAt func([]byte, int64) error) error {
	full := errors.Is(err, syscall.ENOSPC) && (l.tight || sn.limited)
	if err != nil && !full {
		return err
	}
	p := make([]byte, n)
	if err := readAt(p, off); err != nil {
		return err
	}
	if full {
		l.count("image write refused")
		err = i.settleAt(p, off)
	} else {
		err = i.holds(p, off)
	}
	if err != nil {
		return &wrong{fmt.Errorf("image of %s: %w", sn.name, err)}
	}
	return nil
}

// wrong is an error that nothing excuses: other bytes than there must be.
type wrong struct{ error }

// excuse returns nil if it is right that a snapshot cannot be read: it is being
// destroyed, or has overflowed where it may.
func (l *life) excuse(sn *taken, err error) error {
	if w := (*wrong)(nil); errors.As(err, &w) {
		return err
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	if sn.state != present || sn.mayBeGone() {
		return nil
	}
	if !l.tight && !sn.limited {
		return fmt.Errorf("use %s: %w", sn.name, err)
	}
	state, readErr := os.ReadFile(l.d.snapshot(sn.name, "state"))
	if readErr != nil || string(state) != "overflowed\n" {
		return fmt.Errorf("use %s, whose state is %q: %w", sn.name, state, err)
	}
	sn.lost = true
	l.told["overflowed"]++
	return nil
}
