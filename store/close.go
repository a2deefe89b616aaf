// Closing a pool.

package store

import (
	"context"
	"errors"
	"fmt"
)

var errClosed = errors.New("snapstore is closed")

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
		go l.close()
	}
	late, cancel := context.WithTimeout(context.Background(), p.closeWait)
	defer cancel()
	var errs []error
	for _, l := range ledgers {
		select {
		case <-l.closed:
		case <-late.Done():
		}
		errs = append(errs, l.closeError())
	}
	return errors.Join(errs...)
}

// close closes the part once the keeper, which uses it to its end, is gone.
func (l *ledger) close() {
	<-l.gone
	l.closeErr = l.part.Close()
	close(l.closed)
}

// closeError is what came of close so far.
func (l *ledger) closeError() error {
	err := errHangs
	select {
	case <-l.closed:
		err = l.closeErr
	default:
	}
	if err != nil {
		return fmt.Errorf("close snapstore %v: %w", l.traits.Spec, err)
	}
	return nil
}
