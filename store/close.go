// Closing a pool.

package store

import (
	"errors"
	"fmt"
	"time"
)

var errClosed = errors.New("snapstore is closed")

// closeWait is how long Close waits for parts that may hang.
const closeWait = 10 * time.Second

// Close ends what runs in the background and closes all parts. It leaves what
// they hold as it is: a successor may adopt it. A part that hangs is left alone
// after a while, with an error. No method but Check and InUse may be called
// afterwards, nor while it runs.
func (p *Pool) Close() error {
	p.mu.Lock()
	if p.closed {
		p.mu.Unlock()
		return errClosed
	}
	p.closed = true
	close(p.done)
	p.noteFreed()
	ledgers := p.ledgers
	p.mu.Unlock()

	<-p.watched
	for _, l := range ledgers {
		go func() { l.closed <- l.close() }()
	}
	late := time.After(closeWait)
	var errs []error
	for _, l := range ledgers {
		select {
		case err := <-l.closed:
			errs = append(errs, err)
		case <-late:
			late = time.After(0)
			errs = append(errs, fmt.Errorf("close snapstore %v: it hangs", l.traits.Spec))
		}
	}
	return errors.Join(errs...)
}

// close waits for the keeper, which uses the part to its end.
func (l *ledger) close() error {
	<-l.gone
	if err := l.part.Close(); err != nil {
		return fmt.Errorf("close snapstore %v: %w", l.traits.Spec, err)
	}
	return nil
}
